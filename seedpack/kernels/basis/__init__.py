"""Kernels of the basis codec."""
