"""Measure the loss of quality: perplexity, KL divergence, relative error, effective rank."""
