"""What all Triton kernels share: products and decoding over tiles that a codec regenerates, and how they are launched."""
