"""Run a language model on all calibration text at once, one decoder layer after the other.

All hidden states pass through a layer, some sequences at a time, before the next one runs: so only one layer's Hessians
are in memory, and a model whose weights lie on disk (accelerate's offloading) reads each of them once for each few
sequences.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seedpack.converter.calibration.hessians import Hessians, evaluated
from seedpack.errors import ModelError

TOKENS_AT_ONCE = 4096


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that a transformers model is a stack of, by name."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)}
    return {name: layer for name, layer in layers.items() if not any(name.startswith(f"{outer}.") for outer in layers)}


def on_disk(model: nn.Module) -> bool:
    """Whether some of a model's weights are not in memory."""
    return any(parameter.is_meta for parameter in model.parameters())


def device_of(model: Any) -> torch.device:
    """Where a model wants its inputs; the CPU, if its weights are on disk."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


Found = Callable[[str, dict[str, Tensor], Tensor | None], None]
Skip = Callable[[str, Tensor], Tensor | None]
Replaced = Callable[[dict[str, Tensor]], AbstractContextManager[None]]
Watch = Callable[[str, int, int], None]  # what is done, units done since the last call, units in all


@torch.inference_mode()
def run(model: Any, tokens: Tensor, found: Found, skip: Skip, replaced: Replaced | None = None) -> None:
    """Run a causal language model of transformers on tokens [n, context].

    Args:
        model: on any device, or offloaded.
        tokens: int64.
        found: called after each layer with its name, the Hessians of its linear layers by the name of the weight, and its
            output; in the end with "", those of what belongs to no layer, the output head among them, and None.
        skip: given a layer's name and its input, its output, if it need not be run.
        replaced: given a layer's Hessians, a context in which its weights are others, for the output that the next layer
            sees.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ModelError(f"{type(model).__name__}: has no decoder layers that seedpack could calibrate one by one")
    names = {name: dict(layer.named_modules(prefix=name)) for name, layer in layers.items()}
    others = {
        name: module for name, module in model.base_model.named_modules(prefix=_prefix(model))
        if not any(name == layer or name.startswith(f"{layer}.") for layer in layers)
    }  # fmt: skip
    rows = max(1, TOKENS_AT_ONCE // tokens.shape[1])
    head = model.get_output_embeddings()

    def call(name: str, forward: Any, fed: Fed) -> Any:
        fed.require_one_stream(model, tokens)
        return _through(name, names[name], forward, fed, rows, found, skip, replaced)

    with Hessians(others) as outside, layer_by_layer(model, call), evaluated(model):
        out = model.base_model(input_ids=tokens.to(device_of(model)), use_cache=False)[0]
    rest = _weights(outside.means())
    if isinstance(head, nn.Linear):
        last = Hessians({})
        for part in out.split(rows):
            last.add("head", head, part)
        rest |= {f"{name}.weight": last.means()["head"] for name, module in model.named_modules() if module is head}
    found("", rest, None)


def _through(
    name: str, modules: dict[str, nn.Module], forward: Any, fed: Fed, rows: int, found: Found, skip: Skip,
    replaced: Replaced | None,
) -> Any:  # fmt: skip
    """A layer's output for all sequences, some at a time."""
    known = skip(name, fed.hidden)
    if known is not None:
        out = fed.some(forward, slice(0, 1))  # tells whether the layer gives a tuple
        return (known,) if isinstance(out, tuple) else known

    def passed() -> Any:
        return joined([fed.some(forward, here) for here in slices(len(fed.hidden), rows)])

    with Hessians(modules) as hessians:
        whole = passed()
    values = _weights(hessians.means())
    if replaced is not None:
        with replaced(values):
            whole = passed()
    found(name, values, hidden_in(whole))
    _give_back()
    return whole


def _give_back() -> None:
    """What is free goes back to the system, which glibc would keep in pieces, some more for each layer."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Backward passes recompute what is inside a decoder layer instead of keeping it."""

    def call(name: str, forward: Any, fed: Fed) -> Any:
        return checkpoint(forward, *fed.args, use_reentrant=False, **fed.kwargs)

    with layer_by_layer(model, call):
        yield


@contextmanager
def differentiable(model: Any, names: Sequence[str] = ()) -> Iterator[list[nn.Parameter]]:
    """Gradients for the parameters of some names alone, in evaluation; afterwards the model is as it was."""
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


def first_input(model: Any, tokens: Tensor) -> Tensor:
    """The hidden states [n, context, hidden] that the first decoder layer is fed for tokens [n, context]."""

    def call(name: str, forward: Any, fed: Fed) -> Any:
        raise _Enough(fed.hidden)

    try:
        with layer_by_layer(model, call), torch.no_grad():
            model.base_model(input_ids=tokens.to(device_of(model)), use_cache=False)
    except _Enough as enough:
        return enough.args[0]  # type: ignore[no-any-return]
    raise ModelError(f"{type(model).__name__}: ran without any of its decoder layers; leave --tune out")


class _Enough(Exception):  # noqa: N818 (no error)
    """A layer was reached, and no more is wanted."""


class Fed:
    """What a decoder layer is called with, for all sequences.

    Args:
        args: positional.
        kwargs: by name.
        heads: attention heads of the model, 0 if it has none.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], heads: int):
        self.args, self.kwargs, self._heads = args, kwargs, heads

    @property
    def hidden(self) -> Tensor:
        """The hidden states [n, context, hidden]."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]  # type: ignore[no-any-return]

    def some(self, forward: Any, here: slice, hidden: Tensor | None = None) -> Any:
        """The output of a layer for some sequences, with other hidden states if they are given."""
        args, kwargs = (_some(value, len(self.hidden), here, self._heads) for value in (self.args, self.kwargs))
        if hidden is not None and args:
            args = (hidden, *args[1:])
        elif hidden is not None:
            kwargs["hidden_states"] = hidden
        return forward(*args, **kwargs)

    def require_one_stream(self, model: Any, tokens: Tensor) -> None:
        """Refuse models whose layers are fed something else than one hidden state for each token."""
        shape = list(self.hidden.shape)
        if shape[:2] != list(tokens.shape) or len(shape) != 3:
            raise ModelError(
                f"{type(model).__name__}: its layers are fed {shape} for tokens {list(tokens.shape)}, expected one hidden "
                "state a token; calibration does not know such models, compress it without"
            )


def hidden_in(out: Any) -> Tensor:
    """The hidden states in a layer's output."""
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def joined(parts: list[Any]) -> Any:
    """A layer's outputs for some sequences each, as one for all: of tuples, which may hold attention, the hidden states."""
    whole = torch.cat([hidden_in(part) for part in parts])
    return (whole,) if isinstance(parts[0], tuple) else whole


def slices(count: int, size: int) -> list[slice]:
    """0 … count - 1, at most `size` at a time."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _some(value: Any, count: int, here: slice, heads: int) -> Any:
    """Some sequences of arguments: of tensors with more than one axis whose first one counts all of them, or some for each."""
    if isinstance(value, Tensor):
        of_heads = value.dim() == 3 and value.shape[:2] == (heads, 1)  # MPT's biases, the same for all sequences
        if value.dim() < 2 or value.shape[0] % count or of_heads:
            return value
        times = value.shape[0] // count  # as alibi's, of each head
        return value[here.start * times : here.stop * times]
    if isinstance(value, dict):
        return {key: _some(item, count, here, heads) for key, item in value.items()}
    return type(value)(_some(item, count, here, heads) for item in value) if type(value) in (tuple, list) else value


@contextmanager
def layer_by_layer(model: Any, call: Callable[[str, Any, Fed], Any]) -> Iterator[None]:
    """Decoder layers whose forward pass is `call`ed with their name, what it was, and what they are fed."""
    layers, heads = decoder_layers(model), getattr(model.config.get_text_config(), "num_attention_heads", None) or 0
    before = {name: vars(layer).get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        vars(layer)["forward"] = lambda *args, name=name, forward=layer.forward, **kwargs: call(
            name, forward, Fed(args, kwargs, heads)
        )
    try:
        yield
    finally:
        for name, layer in layers.items():
            if before[name] is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = before[name]


def _weights(hessians: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.weight": value for name, value in hessians.items()}


def _prefix(model: Any) -> str:
    return str(model.base_model_prefix) if model.base_model is not model else ""
