"""Layers for training: noise times coefficients (RANDUMB), and a tree of small blocks (fast feedforward)."""

from seedpack.nn.distil import fastfeedforward_from
from seedpack.nn.fast_feedforward import FastFeedforward, hardening_loss
from seedpack.nn.noise import Conv2d, Embedding, Linear

__all__ = ["Conv2d", "Embedding", "FastFeedforward", "Linear", "fastfeedforward_from", "hardening_loss"]
