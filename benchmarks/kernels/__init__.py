"""Codecs and fused products on random and real matrices: distortion, search, decoding, speed."""
