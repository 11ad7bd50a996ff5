"""Runs of the converter itself."""
