"""Every architecture of the installed transformers, tiny and with random weights: packed, loaded, unpacked, run and compared."""
