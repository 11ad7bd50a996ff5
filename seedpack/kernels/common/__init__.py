"""Shared by all kernels: bit fields, tiles of rows, LLVM vectors, and tiles of regenerated weights on GPUs."""
