"""The operations, by codec: `*_reference.py` is the definition in plain torch; the other backends agree with it bit for bit
where results are integers, and up to the order of summation where they are products."""
