"""What packing cost: perplexity, KL divergence, relative error, effective rank."""
