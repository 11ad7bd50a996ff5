"""Photographs as coefficients, and classifiers of images, packed."""
