"""Networks trained in a random subspace, supermasks, layers of noise, fast feedforward."""
