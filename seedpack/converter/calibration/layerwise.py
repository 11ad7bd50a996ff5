"""Run a language model on all calibration text at once, one decoder layer after the other.

All hidden states pass through a layer, some sequences at a time, before the next one runs: so only one layer's second
moments are in memory, and a model whose weights lie on disk (accelerate's offloading) reads each of them once for each few
sequences.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seedpack.converter.calibration.moments import InputMoments, evaluated, measurable
from seedpack.converter.sources.base import OpenModel
from seedpack.errors import ModelError

TOKENS_AT_ONCE = 4096
TRIED = 5  # sequences, a count that numbers of heads are seldom multiples of
SAME, SAME_HALF = 1e-3, 5e-2  # of the norm: what sums in another order differ by at most, in float32 or in 16 bits

Moments = dict[str, Tensor]  # by the names of weights
LayerDone = Callable[[str, Moments, Tensor | None], None]
SkipLayer = Callable[[str, Tensor], Tensor | None]
CallLayer = Callable[[str, Any, "LayerInputs"], Any]


def on_disk(model: nn.Module) -> bool:
    """Return whether some of a model's weights are not in memory."""
    return any(parameter.is_meta for parameter in model.parameters())


def input_device(model: Any) -> torch.device:
    """Return the device of a model's inputs: the CPU, if its weights are on disk."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


@torch.inference_mode()
def run(opened: OpenModel, tokens: Tensor, layer_done: LayerDone, call: CallLayer) -> None:
    """Run a causal language model on tokens [n, context].

    Args:
        opened: the model, on any device, or offloaded.
        tokens: int64.
        layer_done: called in the end with "", the second moments by the names of weights of what belongs to no layer, the
            output head among them, and None.
        call: runs a decoder layer, given its name, its forward pass, and its inputs.
    """
    model = opened.module
    if not opened.layer_names:
        raise ModelError(f"{type(model).__name__}: has no decoder layers that seedpack could calibrate one by one")
    inside = {
        name for layer in opened.layer_names for name, _ in model.get_submodule(layer).named_modules(prefix=layer)
    }
    head = model.get_output_embeddings()
    others = {n: m for n, m in model.named_modules() if n not in inside and m is not head}

    def call_layer(name: str, forward: Any, inputs: LayerInputs) -> Any:
        inputs.require_tokens(model, tokens)
        out = call(name, forward, inputs)
        _malloc_trim()
        return out

    with InputMoments(others) as outside, layer_by_layer(model, opened.layer_names, call_layer), evaluated(model):
        hidden = run_to_head(model, tokens)
    layer_done("", by_weight(outside.means()) | _head_moments(model, head, hidden), None)


@torch.inference_mode()
def require_separable(opened: OpenModel, tokens: Tensor) -> None:
    """Refuse a model whose layers do not give what it gives if they run one after the other, a sequence at a time: that goes through
    some layers again, or passes more from layer to layer than hidden states. A few of the tokens [n, context] are tried."""
    model, called = opened.module, set[str]()
    tokens = tokens[: 1 if on_disk(model) else TRIED]
    refused = "calibration does not know such models, compress it without"

    def call(name: str, forward: Any, inputs: LayerInputs) -> Any:
        if name in called:
            raise ModelError(f"{type(model).__name__}: runs its layer {name} more than once; {refused}")
        called.add(name)
        inputs.require_tokens(model, tokens)
        return joined([inputs.run_batch(forward, batch) for batch in slices(len(tokens), 1)])

    with evaluated(model):
        each = [run_to_head(model, sequence) for sequence in tokens.split(1)]
        with layer_by_layer(model, opened.layer_names, call):
            found = run_to_head(model, tokens)
    if found is None or not (expected := [hidden.float() for hidden in each if hidden is not None]):
        return
    same = SAME if found.dtype == torch.float32 else SAME_HALF
    if (found.float() - torch.cat(expected)).norm() > same * torch.cat(expected).norm():
        raise ModelError(f"{type(model).__name__}: passes more from layer to layer than hidden states; {refused}")


def run_to_head(model: Any, tokens: Tensor) -> Tensor | None:
    """Run a model on tokens [n, context] until it calls its output head, as all their logits are large; return what the head is
    given, if it is called."""
    with inputs_of({"": model.get_output_embeddings()}, last="") as seen:
        model(input_ids=tokens.to(input_device(model)), use_cache=False)
    return seen.get("")


def measuring(opened: OpenModel, layer_done: LayerDone, skip: SkipLayer) -> CallLayer:
    """Return what `run` is to do with each decoder layer: measure the inputs of what is in it.

    Args:
        opened: the model.
        layer_done: called after each layer with its name, the second moments of the inputs of its linear layers by the
            name of the weight, and its output.
        skip: given a layer's name and its input, returns its output, if it need not be run.
    """

    def call(name: str, forward: Any, inputs: LayerInputs) -> Any:
        known = skip(name, inputs.hidden)
        if known is not None and inputs.share_state:
            return joined([inputs.run_batch(forward, batch) for batch in inputs.batches()])
        if known is not None:
            return in_form_of(inputs.run_batch(forward, slice(0, 1)), known)
        with InputMoments(dict(opened.module.get_submodule(name).named_modules(prefix=name))) as collected:
            out = joined([inputs.run_batch(forward, batch) for batch in inputs.batches()])
        layer_done(name, by_weight(collected.means()), hidden_in(out))
        return out

    return call


def _head_moments(model: nn.Module, head: nn.Module, hidden: Tensor | None) -> Moments:
    """Return the second moment of the output head's input, by each of its names, where it was called and is known."""
    if hidden is None or not measurable(head):
        return {}
    collected = InputMoments({})
    for batch in batches_of(hidden):
        collected.add("head", head, hidden[batch])
    moment = collected.means()["head"]
    return {f"{name}.weight": moment for name, module in model.named_modules() if module is head}


def _malloc_trim() -> None:
    """Give free memory back to the system, which glibc would keep in pieces, some more for each layer."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def recomputed(model: Any, layer_names: Iterable[str]) -> Iterator[None]:
    """Have backward passes recompute what is inside a decoder layer instead of keeping it."""

    def call(name: str, forward: Any, inputs: LayerInputs) -> Any:
        return checkpoint(forward, *inputs.args, use_reentrant=False, **inputs.kwargs)

    with layer_by_layer(model, layer_names, call):
        yield


@contextmanager
def differentiable(model: Any, names: Sequence[str] = ()) -> Iterator[list[nn.Parameter]]:
    """Enable gradients for the parameters of some names alone, in evaluation; afterwards the model is as it was."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    chosen = [model.get_parameter(name).requires_grad_(True) for name in names]
    try:
        with evaluated(model), torch.enable_grad():
            yield chosen
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
        for parameter in chosen:
            parameter.grad = None


def first_input(model: Any, layer_names: Iterable[str], tokens: Tensor) -> Tensor:
    """Return the hidden states [n, context, hidden] that the first decoder layer takes for tokens [n, context]."""

    found: list[Tensor] = []

    def call(name: str, forward: Any, inputs: LayerInputs) -> Any:
        found.append(inputs.hidden)
        raise _Enough

    with suppress(_Enough), layer_by_layer(model, layer_names, call), torch.no_grad():
        model(input_ids=tokens.to(input_device(model)), use_cache=False)
    if not found:
        raise ModelError(f"{type(model).__name__}: ran without any of its decoder layers; leave --tune out")
    return found[0]


@contextmanager
def inputs_of(modules: Mapping[str, nn.Module], last: str | None = None) -> Iterator[dict[str, Tensor]]:
    """Take down what modules are called with, by their names here, until the last one is, if one is named."""
    seen: dict[str, Tensor] = {}

    def called(name: str, x: Tensor) -> None:
        seen[name] = x
        if name == last:
            raise _Enough

    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: called(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        with suppress(_Enough):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


class _Enough(Exception):  # noqa: N818 (no error)
    """A layer was reached, and no more is wanted."""


class LayerInputs:
    """The arguments that a decoder layer is called with, for all sequences.

    Args:
        args: positional.
        kwargs: by name.
        heads: attention heads of the model, 0 if it has none.
        share_state: some of the model's layers read what others before them have written down, as Gemma 4's keys and values.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], heads: int, share_state: bool = False):
        self.args, self.kwargs, self._heads, self.share_state = args, kwargs, heads, share_state

    @property
    def hidden(self) -> Tensor:
        """The hidden states [n, context, hidden]."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]  # type: ignore[no-any-return]

    def run_batch(self, forward: Any, batch: slice, hidden: Tensor | None = None) -> Any:
        """Return the output of a layer for some sequences, with other hidden states if they are given."""
        args, kwargs = (
            _select(value, len(self.hidden), self.hidden.shape[1], batch, self._heads, hidden is not None)
            for value in (self.args, self.kwargs)
        )
        if hidden is not None and args:
            args = (hidden, *args[1:])
        elif hidden is not None:
            kwargs["hidden_states"] = hidden
        return forward(*args, **kwargs)

    def batches(self) -> list[slice]:
        """Return the sequences that are run at once."""
        return batches_of(self.hidden)

    def require_tokens(self, model: Any, tokens: Tensor) -> None:
        """Refuse models whose layers take something else than hidden states, one or several, of each token."""
        shape = list(self.hidden.shape)
        if shape[:2] != list(tokens.shape) or len(shape) < 3:
            raise ModelError(
                f"{type(model).__name__}: its layers take {shape} for tokens {list(tokens.shape)}, expected hidden states "
                "of each token; calibration does not know such models, compress it without"
            )


def hidden_in(out: Any) -> Tensor:
    """Return the hidden states in a layer's output."""
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def joined(parts: list[Any]) -> Any:
    """Join the hidden states in a layer's outputs for some sequences each."""
    return in_form_of(parts[0], torch.cat([hidden_in(part) for part in parts]))


def in_form_of(out: Any, hidden: Tensor) -> Any:
    """Return hidden states as a layer gives them: where it gives a tuple, without what else is in it, as attention or states."""
    return (hidden, *[None] * (len(out) - 1)) if isinstance(out, tuple) else hidden


def batches_of(hidden: Tensor) -> list[slice]:
    """Return the sequences of hidden states [n, context, hidden] that are run at once."""
    return slices(len(hidden), max(1, TOKENS_AT_ONCE // hidden.shape[1]))


def slices(count: int, size: int) -> list[slice]:
    """Return slices of 0 … count - 1, at most `size` at a time."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _select(value: Any, count: int, context: int, batch: slice, heads: int, is_other: bool) -> Any:
    """Return some sequences of arguments: of tensors whose first axis of several counts all of them, or some for each.

    A container that layers write to, and others read, is kept apart for each batch, and for other hidden states than the model's.
    """
    if isinstance(value, Tensor):
        of_heads = value.dim() == 3 and value.shape[:2] == (heads, 1)  # MPT's biases, the same for all sequences
        is_flat = value.dim() == 1 and value.shape[0] == count != context  # as a language of each sequence
        if (value.dim() < 2 and not is_flat) or value.shape[0] % count or of_heads:
            return value
        times = value.shape[0] // count  # as alibi's, of each head
        return value[batch.start * times : batch.stop * times]
    if isinstance(value, MutableMapping) and not isinstance(value, dict):
        apart, key = vars(value).setdefault("of_batches", {}), (batch.start, batch.stop, is_other)
        if key not in apart:
            apart[key] = copy(value)
            del vars(apart[key])["of_batches"]
        return apart[key]
    if isinstance(value, dict):
        return {key: _select(item, count, context, batch, heads, is_other) for key, item in value.items()}
    return (
        type(value)(_select(item, count, context, batch, heads, is_other) for item in value)
        if type(value) in (tuple, list)
        else value
    )


@contextmanager
def layer_by_layer(model: Any, layer_names: Iterable[str], call: CallLayer) -> Iterator[None]:
    """Replace the forward pass of decoder layers by a `call` with their name, what it was, and the layer's inputs."""
    layers = {name: model.get_submodule(name) for name in layer_names}
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None) or 0
    shares = any(getattr(module, "is_kv_shared_layer", False) for module in model.modules())  # transformers' attentions
    before = {name: vars(layer).get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        vars(layer)["forward"] = lambda *args, name=name, forward=layer.forward, **kwargs: call(
            name, forward, LayerInputs(args, kwargs, heads, shares)
        )
    try:
        yield
    finally:
        for name, layer in layers.items():
            if before[name] is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = before[name]


def by_weight(moments: Moments) -> Moments:
    """Return moments by the names of weights instead of those of layers."""
    return {f"{name}.weight": value for name, value in moments.items()}
