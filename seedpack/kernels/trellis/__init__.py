"""The kernels of the trellis codec."""
