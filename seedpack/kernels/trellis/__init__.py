"""Kernels of the trellis codec."""
