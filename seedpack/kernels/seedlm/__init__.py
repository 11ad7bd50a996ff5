"""The kernels of the SeedLM codec."""
