"""Run a language model layer by layer, pack each layer before the next one runs, and make up for its errors in what follows.

What is packed gives other inputs x̃ than the original's x to all that comes after. A weight W is therefore fitted to what does of x̃
what W does of x, as far as that goes: to

    W + s·(W·E[(x - x̃)·x̃ᵀ] + E[(r - r̃)·x̃ᵀ])·(E[x̃·x̃ᵀ] + λ)⁻¹

At s = 1 that is the ridge regression of the original's outputs on x̃ (GPTAQ, Li et al., arXiv 2504.02692; Qronos, Zhang et al.,
arXiv 2505.11695). The second term is there for layers whose output is added to a residual stream: r is that stream in the original,
and r̃ with packed weights. Half of the step and a strong λ serve other texts best (docs/calibration.md).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from seedpack.converter.calibration.layerwise import (
    CallLayer,
    LayerDone,
    LayerInputs,
    SkipLayer,
    by_weight,
    hidden_in,
    in_form_of,
    inputs_of,
    joined,
)
from seedpack.converter.calibration.moments import (
    InputMoments,
    add_products,
    faster_in_bfloat16,
    layer_input,
    measurable,
    mirrored,
)
from seedpack.converter.sources.base import OpenModel
from seedpack.converter.statistics import SHIFT
from seedpack.errors import ModelError
from seedpack.loader.layers import is_transposed

STEP = 0.5  # s
DAMPING = 1.0  # λ, in mean diagonals of E[x̃·x̃ᵀ]


class SequenceError(ModelError):
    """A model cannot be packed in sequence."""


Pack = Callable[[dict[str, Tensor]], AbstractContextManager[None]]


def packing(opened: OpenModel, layer_done: LayerDone, skip: SkipLayer, wanted: Container[str], pack: Pack) -> CallLayer:
    """Return what `layerwise.run` is to do with each decoder layer: pack it for those that follow.

    Args:
        opened: the model, in memory.
        layer_done: as for `layerwise.measuring`; it is given shifts too, by the names of weights with `SHIFT` behind.
        skip: as for `layerwise.measuring`, for the hidden states that packed layers give.
        wanted: the names of weights that are to be packed.
        pack: given second moments and shifts, a context in which these weights are packed.
    """
    hidden: Tensor | None = None
    original: Tensor | None = None
    called = set[str]()

    def call(name: str, forward: Any, inputs: LayerInputs) -> Any:
        nonlocal hidden, original
        if name in called or (original is not None and inputs.hidden is not original):
            raise ModelError(f"{name}: does not take what the layer before it gives, once")
        if inputs.share_state:
            raise ModelError(f"{name}: shares keys and values with other layers")
        called.add(name)
        given = inputs.hidden if hidden is None else hidden
        layer = DecoderLayer(name, opened.module.get_submodule(name), forward, inputs, given, wanted)
        if (hidden := skip(name, given)) is not None:
            out = layer.original()
        else:
            out, hidden, found = layer.packed(pack)
            layer_done(name, found, hidden)
        original = hidden_in(out)
        if name != opened.layer_names[-1]:
            return out
        return in_form_of(out, hidden)  # the head's input is that of the packed model

    return call


@dataclass
class Group:
    """Linear layers that take the same input.

    Attributes:
        names: of the layers.
        streams: by the names of those whose output is added to a residual stream: the module that takes the stream before, ""
            for the decoder layer itself.
        ends: whether the decoder layer's output is the stream after the one that it has.
    """

    names: list[str]
    streams: dict[str, str] = field(default_factory=dict)
    ends: bool = False


@dataclass
class DecoderLayer:
    """A decoder layer that is to be packed.

    Attributes:
        name: its name.
        module: itself.
        forward: what it is called by.
        inputs: what the original layers before it give.
        hidden: the hidden states [n, context, hidden] that the packed ones give.
        wanted: the names of weights that are to be packed.
    """

    name: str
    module: nn.Module
    forward: Any
    inputs: LayerInputs
    hidden: Tensor
    wanted: Container[str]

    def __post_init__(self) -> None:
        self._modules = dict(self.module.named_modules(prefix=self.name))
        self._linear = {name: module for name, module in self._modules.items() if measurable(module)}
        self._batches = self.inputs.batches()
        self._last: list[tuple[Tensor, Tensor]] = []  # the stream before the last layer, and that layer's input

    def packed(self, pack: Pack) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """Pack the weights of one input after the other.

        Args:
            pack: given second moments and shifts by the names of weights, a context in which these are packed.

        Returns:
            What the original layer gives, the hidden states that the packed one gives, and all moments and shifts.
        """
        groups = self._look()
        watched = {first for group in groups for first in (group.names[0], *group.streams.values())}
        originals, outputs = [], []
        for batch in self._batches:
            with self._inputs_of(watched) as seen:
                outputs.append(self._run_batch(batch))
            originals.append(seen)
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for group in groups:
                values = self._measured(group, originals)
                stack.enter_context(pack(values))
                found |= values
            rest = [name for name in self._linear if f"{name}.weight" not in found]
            with InputMoments({name: self._linear[name] for name in rest}) as collected:
                hidden = self._run(() if rest else groups)
            if values := by_weight(collected.means()):
                stack.enter_context(pack(values))
                found |= values
                hidden = self._run()
        return joined(outputs), hidden, found

    def original(self) -> Any:
        """Return what the original layer gives, as when it was packed."""
        return joined([self._run_batch(batch) for batch in self._batches])

    def _run(self, groups: Sequence[Group] = ()) -> Tensor:
        """Return what the layer gives, of which only the last of some groups may have changed since its input was measured."""
        if groups and groups[-1].ends:
            last = self._linear[groups[-1].names[0]]
            with self._quickly():
                return torch.cat([stream + last(x) for stream, x in self._last])
        return hidden_in(joined([self._run_batch(batch, self.hidden[batch]) for batch in self._batches]))

    def _run_batch(self, batch: slice, hidden: Tensor | None = None) -> Any:
        with self._quickly():
            return self.inputs.run_batch(self.forward, batch, hidden)

    def _quickly(self) -> AbstractContextManager[None]:
        """Return a context in which products of float32 are of bfloat16, where that is faster; the stream stays as it is."""
        return torch.autocast(self.hidden.device.type, torch.bfloat16) if self._is_quick else nullcontext()

    @cached_property
    def _is_quick(self) -> bool:
        if self.hidden.dtype != torch.float32 or not faster_in_bfloat16(self.hidden.device):
            return False
        try:
            with torch.autocast(self.hidden.device.type, torch.bfloat16):
                out = self.inputs.run_batch(self.forward, slice(0, 1))
        except Exception:  # models fail in many ways where dtypes are mixed
            return False
        return hidden_in(out).dtype == torch.float32

    def _look(self) -> list[Group]:
        """Return the layers of each input that all tokens have, by what they do with one sequence, in order."""
        one, calls, outputs = slice(0, 1), list[tuple[str, Tensor]](), dict[str, Tensor]()
        hooks = [
            m.register_forward_pre_hook(lambda m, args, name=name: calls.append((name, args[0])) if args else None)
            for name, m in self._modules.items()
        ] + [
            m.register_forward_hook(lambda m, args, out, name=name: outputs.update({name: out}))
            for name, m in self._linear.items()
        ]
        try:
            out = hidden_in(self.inputs.run_batch(self.forward, one))
        finally:
            for hook in hooks:
                hook.remove()
        hidden = self.inputs.hidden[one]
        names = [name for name, _ in calls]
        taken = [(name, value) for name, value in calls if isinstance(value, Tensor) and names.count(name) == 1]
        groups: dict[int, Group] = {}
        for index, (name, value) in enumerate(taken):
            if name in self._linear and value.shape[:-1].numel() == hidden.shape[:-1].numel():
                group = groups.setdefault(id(value), Group([]))
                group.names.append(name)
                before = [("", hidden), *((n, v) for n, v in taken[:index] if n not in self._linear)]
                later = [v for n, v in taken[index:] if n not in self._linear]
                if (stream := _stream_before(outputs[name], before, [*later, out])) is not None:
                    group.streams[name] = stream
                    group.ends = _stream_before(outputs[name], before, [out]) == stream
        found = list(groups.values())
        for group in found:
            group.ends &= group is found[-1] and len(group.names) == 1
        return found

    def _inputs_of(self, names: Iterable[str], last: str | None = None) -> AbstractContextManager[dict[str, Tensor]]:
        return inputs_of({name: self._modules[name] for name in names if name}, last)

    def _measured(self, group: Group, originals: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the second moment of a group's input, and the shifts of its weights; nothing if not all tokens go through it."""
        first, streams = group.names[0], {*group.streams.values()}
        layer, sums, count = self._linear[first], dict[str, Tensor](), 0
        products: Tensor | None = None
        weights = {name: _matrix(self._linear[name]) for name in group.names if f"{name}.weight" in self.wanted}

        def add(key: str, y: Tensor, x: Tensor) -> None:
            sums[key] = y.mT @ x if key not in sums else sums[key].addmm_(y.mT, x)

        for batch, original in zip(self._batches, originals, strict=True):
            with self._inputs_of({first, *streams}, last=first) as seen:
                self._run_batch(batch, self.hidden[batch])
            seen[""], original[""] = self.hidden[batch], self.inputs.hidden[batch]
            tokens = seen[""].shape[:-1].numel()
            if any(first not in inputs or inputs[first].shape[:-1].numel() != tokens for inputs in (seen, original)):
                return {}
            if group.ends:
                self._last.append((seen[group.streams[first]], seen[first]))
            x = layer_input(layer, seen[first])
            products, count = add_products(products, x), count + len(x)
            moved = layer_input(layer, original[first]) - x
            if weights.keys() - group.streams:
                add("moved", moved, x)
            for name in weights.keys() & group.streams:
                lost = original[group.streams[name]].float() - seen[group.streams[name]].float()
                add(name, torch.addmm(lost.flatten(0, -2), moved, weights[name].mT), x)
        assert products is not None
        moment = mirrored(products / count)
        moment_on_cpu, damping = moment.cpu(), (DAMPING * moment.diagonal().mean()).clamp_min(1e-30)
        found = {f"{name}.weight": moment_on_cpu for name in group.names}
        factor = torch.linalg.cholesky(
            moment + damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        )
        for name, weight in weights.items():
            lost = sums[name] if name in group.streams else weight @ sums["moved"]
            if lost.any():
                shift = torch.cholesky_solve(lost.mT * (STEP / count), factor).mT
                found[f"{name}.weight{SHIFT}"] = shift.bfloat16().cpu().contiguous()
        return found


def _matrix(layer: Any) -> Tensor:
    """Return a linear layer's weight [out, in] in float32."""
    weight: Tensor = layer.weight.float()
    return weight.mT if is_transposed(layer) else weight.flatten(1)


def _stream_before(added: Any, before: list[tuple[str, Tensor]], after: list[Tensor]) -> str | None:
    """Return the name of the stream that becomes one of others once an output is added to it."""
    if not isinstance(added, Tensor) or not added.is_floating_point():
        return None
    for name, stream in before:
        if stream.shape == added.shape:
            total, near = stream + added, torch.finfo(added.dtype).eps * (stream.abs() + added.abs())
            if any(other.shape == total.shape and bool(((other - total).abs() <= near).all()) for other in after):
                return name
    return None
