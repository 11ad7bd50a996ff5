"""Calibration: text for a model to read, and statistics of the inputs of its layers.

Language models are called by transformers' public interface (`base_model`, `get_output_embeddings`, `config`, …), which is
not imported here: `seedpack.hf` opens them.
"""
