"""Serve packed models with vLLM: the plugin that an installed seedpack brings along."""

from __future__ import annotations


def register() -> None:
    """Make vLLM know the quantisation method `seedpack`; vLLM calls it in each of its processes, more than once."""
    import seedpack.vllm.quantization  # noqa: F401 (registers itself)
    from seedpack.vllm.loading import decode_what_stays_dense

    decode_what_stays_dense()
