"""Kernels of the SeedLM codec."""
