"""Every architecture of the installed transformers, tiny and with random weights: packed, run and compared."""
