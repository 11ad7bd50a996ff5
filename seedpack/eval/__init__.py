"""Measure the loss of quality: perplexity, KL divergence, embeddings, classes, relative error, effective rank."""
