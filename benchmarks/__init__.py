"""Benchmarks, a folder per subject: run from the top of a checkout as `python -m benchmarks.language.table --write`."""
