"""Packed layers and their operators, and the ways between a checkpoint and a module or dense tensors."""
