"""transformers models that can run: opened from a folder or live, with their decoder layers and the text that they write."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack.converter.calibration.moments import evaluated
from seedpack.converter.sources.base import OpenModel
from seedpack.converter.trust import trusts_remote_code
from seedpack.errors import ModelError, first_line
from seedpack.formats.reader import read_json
from seedpack.hf.complete import load_complete
from seedpack.hf.internals import decoder_layers
from seedpack.hf.remote_code import model_class
from seedpack.hf.tasks import LANGUAGE, load_for_task, load_processor
from seedpack.memory import free_bytes

SEQUENCES_AT_ONCE = 64  # written side by side


def open_pretrained(model: Any, tokenizer: Any = None) -> OpenModel:
    """Return a transformers model with what calibration on text needs."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not hasattr(model, "generate") or head is None or model.config.is_encoder_decoder:
        return OpenModel(model, tokenizer)
    return OpenModel(model, tokenizer, tuple(decoder_layers(model)), generate_tokens)


def open_folder_model(path: Path, where: Path | None = None) -> OpenModel:
    """Open a folder's model, in float32, and its tokenizer; on disk where it fills more than half of what is free.

    Args:
        path: the folder.
        where: it is a copy of, for messages.
    """
    config = read_json(path / "config.json")
    cls = model_class(path, config)
    files = list(path.glob("*.safetensors")) or list(path.glob("*.bin"))
    size = sum(file.stat().st_size for file in files)
    options: dict[str, Any] = {"dtype": torch.float32}
    trusted = {"trust_remote_code": True} if trusts_remote_code() else {}
    holder = None
    if 2 * size > free_bytes() / 2:
        holder = tempfile.TemporaryDirectory(prefix="seedpack-")
        options = {"dtype": "auto", "device_map": {"": "disk"}, "offload_folder": holder.name}
    try:
        model = load_complete(cls, path, where or path, **options, **trusted)
    except ModelError:
        raise
    except Exception as error:  # the libraries' own
        raise ModelError(f"{where or path}: transformers cannot run it ({first_line(error)})") from error
    if holder is not None:
        weakref.finalize(model, holder.cleanup)
    return open_pretrained(model, tokenizer_of(path))


def load_language_model(path: str | Path, dtype: torch.dtype | str = torch.float32) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a folder (dense or packed), a GGUF file or a hub id."""
    return load_for_task(path, LANGUAGE, dtype), load_processor(path, LANGUAGE)


def tokenizer_of(path: Path) -> Any:
    """Return a folder's tokenizer, or None: not every model has one."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trusts_remote_code())
    except Exception:  # transformers fails in many ways where files are missing
        return None


def generate_tokens(
    model: Any, tokens: int, context: int, seed: int = 0, progress: Callable[[int], None] | None = None
) -> Tensor:
    """Have a causal language model write text, int64 [n, context] (self-calibration: Williams et al., NAACL 2025).

    Sampled from its own distribution at temperature 1, from nothing but its first token on; no data set is needed.

    Args:
        model: a causal language model of transformers.
        tokens: in all; n is at least one.
        context: tokens per sequence.
        seed: of the sampling.
        progress: called with the tokens written since the last call.
    """
    from transformers import GenerationConfig

    count = max(1, tokens // context)
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    first = getattr(model.config, "bos_token_id", None)
    first = first[0] if isinstance(first, list) else first
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    options = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=context - 1,
        min_new_tokens=context - 1,
        pad_token_id=0,
    )
    sequences = []
    with torch.random.fork_rng(), torch.inference_mode(), evaluated(model):
        torch.manual_seed(seed)
        for indices in torch.arange(count).split(SEQUENCES_AT_ONCE):
            shape = (len(indices), 1)
            start = torch.randint(vocabulary, shape) if first is None else torch.full(shape, first)
            start = start.to(device)
            written = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                generation_config=options,
                logits_processor=[_ProgressProcessor(progress)] if progress else None,
            )
            sequences.append(written[:, :context].cpu())
    return torch.cat(sequences)


class _ProgressProcessor:
    """Reports each token written, and changes nothing."""

    def __init__(self, progress: Callable[[int], None]):
        self._progress = progress

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self._progress(len(ids))
        return scores
