"""Whole models: where weights come from, which codec each gets, and layers that stay packed."""
