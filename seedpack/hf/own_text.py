"""Text that a causal language model of transformers writes, to be calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from seedpack.converter.calibration.moments import evaluated, faster_in_bfloat16
from seedpack.converter.snapshot import Snapshot
from seedpack.errors import ModelError
from seedpack.hf.internals import cache_name

SEQUENCES_AT_ONCE = 128  # written side by side


def generate_tokens(
    model: Any,
    tokens: int,
    context: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    snapshot: Snapshot | None = None,
) -> Tensor:
    """Have a causal language model write text, int64 [n, context] (self-calibration: Williams et al., NAACL 2025).

    Sampled from its own distribution at temperature 1; no data set is needed. Each sequence begins with a token drawn from the whole
    vocabulary (as in LLM-QAT, Liu et al., arXiv 2305.17888), after the one that a text begins with, if there is one: texts are
    of more kinds then. Weights are bfloat16 meanwhile, where that is faster.

    Args:
        model: a causal language model of transformers.
        tokens: in all; n is at least one.
        context: tokens per sequence.
        seed: of the sampling.
        progress: called with the tokens written since the last call.
        snapshot: where to begin, and where to keep what is written; the text is the same then.
    """
    from transformers import GenerationConfig

    count = max(1, tokens // context)
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    first = getattr(model.config, "bos_token_id", None)
    first = getattr(model.config.get_text_config(), "bos_token_id", None) if first is None else first
    first = first[0] if isinstance(first, list) else first
    start = 1 if first is None or context == 2 else 2
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    writing = _Writing(model, device, context, start, progress or (lambda done: None), snapshot or Snapshot())
    with (
        torch.random.fork_rng(),
        torch.inference_mode(),
        evaluated(model),
        _in_bfloat16(model),
        _unchanged(model),
        writing.watched(),
    ):
        torch.manual_seed(seed)
        begun, cache = writing.resumed()
        while len(writing.written) < count:
            if begun is None:
                begun = torch.randint(vocabulary, (min(SEQUENCES_AT_ONCE, count - len(writing.written)), start))
                if first is not None:
                    begun[:, 0] = first
            begun, left = begun.to(device), context - begun.shape[1]
            options = GenerationConfig(do_sample=False, max_new_tokens=left, min_new_tokens=left, pad_token_id=0)
            sequences = model.generate(
                begun,
                attention_mask=torch.ones_like(begun),
                generation_config=options,
                logits_processor=[writing],
                **({} if cache is None else {cache_name(): cache}),
            )
            writing.written = torch.cat([writing.written, sequences[:, :context].cpu()])
            begun = cache = None
    return writing.written


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Have a model's predictions left as they are meanwhile: what its generation config says of penalties, beams and forbidden
    tokens is for its users, and `generate` would follow it."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=before.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _in_bfloat16(model: Any) -> Iterator[None]:
    """Hold a model's weights in bfloat16 meanwhile, where that is faster and the model runs like that."""
    if not faster_in_bfloat16(model.device):
        yield
        return
    weights = {parameter: parameter.data for parameter in model.parameters() if parameter.dtype == torch.float32}

    def restore() -> None:
        for parameter, value in weights.items():
            parameter.data = value

    try:
        for parameter, value in weights.items():
            parameter.data = value.bfloat16()
        if not _runs(model):
            restore()
        yield
    finally:
        restore()


def _runs(model: Any) -> bool:
    """Return whether a model gives numbers."""
    try:
        logits = model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device)).logits
    except Exception:  # models fail in many ways where dtypes are mixed
        return False
    return bool(logits.isfinite().all())


class _Writing:
    """Text that is written: draws each token, reports it, and keeps the state from time to time.

    The state is the text, the generators of random numbers, and the keys and values, which would come out in other last bits
    if they were computed anew. Where a cache holds something else, or not all, there is a state where sequences begin.

    Args:
        model: that writes.
        device: that tokens are drawn on.
        context: tokens per sequence.
        start: those that it begins with.
        progress: called with the tokens written since the last call.
        snapshot: the state.

    Attributes:
        written: the sequences that are whole, int64 [n, context].
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        context: int,
        start: int,
        progress: Callable[[int], None],
        snapshot: Snapshot,
    ):
        self._model, self._device, self._progress, self._snapshot = model, device, progress, snapshot
        self._cache: Any = None
        self._start = start
        self.written = snapshot.tensors.get("written", torch.empty(0, context, dtype=torch.int64))

    def resumed(self) -> tuple[Tensor | None, DynamicCache | None]:
        """Set the generators to the state; return the sequences that are begun, and the cache that belongs to them."""
        state, self._snapshot.tensors = self._snapshot.tensors, {}  # which hold memory
        if not state:
            return None, None
        self._progress(self._snapshot.done)
        torch.set_rng_state(state["generator"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self._device)
        layers = [(state[f"{i} keys"], state[f"{i} values"]) for i in range(len(state)) if f"{i} keys" in state]
        parts = [tuple(part.to(self._device) for part in layer) for layer in layers]
        return state["begun"], DynamicCache(parts, config=self._model.config) if parts else None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See the cache that the model is called with."""

        def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self._cache = kwargs.get(cache_name())

        def lay_out(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(arg.contiguous() for arg in args)  # else torch copies the weight for each sequence

        hooks = (
            self._model.register_forward_pre_hook(see, with_kwargs=True),
            self._model.get_output_embeddings().register_forward_pre_hook(lay_out),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Report tokens, and leave one to choose, drawn by its probability; `multinomial` draws a number for every other too."""
        layers = [] if ids.shape[1] == self._start else getattr(self._cache, "layers", [None])
        if all(_holds(layer, ids.shape[1]) for layer in layers):
            state = {"written": self.written, "begun": ids, "generator": torch.get_rng_state()}
            if self._device.type == "cuda":
                state["cuda"] = torch.cuda.get_rng_state(self._device)
            for i, layer in enumerate(layers):  # less what the last token gave
                state |= {f"{i} keys": layer.keys[..., :-1, :], f"{i} values": layer.values[..., :-1, :]}
            done = self.written.numel() + ids.numel() - self._start * (len(self.written) + len(ids))
            self._snapshot.keep(done, state)
        self._progress(len(ids))
        below = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        if not below[:, -1].isfinite().all():
            raise ModelError(
                "the model writes no text: its predictions are no finite numbers; calibrate it on a text of yours, or on none"
            )
        drawn = torch.searchsorted(below, below[:, -1:] * torch.rand_like(below[:, :1]), right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0)


def _holds(layer: Any, count: int) -> bool:
    """Return whether a layer of a cache is the keys and values of so many tokens, and nothing else."""
    plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized
    return plain and layer.keys.shape[-2] == count
