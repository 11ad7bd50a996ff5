"""The operations: each in a folder of its own, `reference.py` the definition, the other files bit-identical to it."""
