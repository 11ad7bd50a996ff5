"""Calibration: text for a model to read, and statistics of the inputs of its layers."""
