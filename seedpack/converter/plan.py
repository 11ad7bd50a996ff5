"""The plan: which tensor gets which codec. Pure data, that can be printed, edited and given back."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seedpack.codecs.base import Codec
from seedpack.codecs.interfaces import HessianFitting
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.registry import codec_to_json, get_codec
from seedpack.dtypes import PACKABLE
from seedpack.errors import CodecError, ModelError
from seedpack.formats import PlannedTensor
from seedpack.formats.header import DTYPE_BYTES, loads_strict, nbytes
from seedpack.loader.layers import codec_matrix

PLAN_VERSION = 1


@dataclass(frozen=True)
class SourceTensor:
    """A tensor as a source has it.

    Attributes:
        kind: what a model uses it for: linear, embedding, head (the output head, or an embedding tied to it), conv, expert, or "" (raw).
        transposed: stored [in, out].
        group: for experts, the parameter that all of the group become parts of in memory.
    """

    dtype: str
    shape: tuple[int, ...]
    kind: str = ""
    transposed: bool = False
    group: str = ""


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: its codec, and why."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: Codec
    source_bytes: int
    kind: str = ""
    transposed: bool = False
    note: str = ""
    group: str = ""

    @property
    def packed(self) -> bool:
        """Whether any codec but raw is used."""
        return not isinstance(self.codec, RawCodec)

    @property
    def codec_shape(self) -> tuple[int, ...]:
        """The shape that the codec sees."""
        return codec_matrix(self.shape, self.transposed) if self.packed else self.shape

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts."""
        return self.for_writer().nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight."""
        return 8 * self.stored_bytes / max(1, math.prod(self.shape))

    def for_writer(self) -> PlannedTensor:
        """What the format writer needs."""
        parts = self.codec.parts(self.codec_shape)
        return PlannedTensor(
            self.name, self.codec.spec(), self.dtype, self.shape, parts, self.packed and self.transposed
        )


@dataclass(frozen=True)
class Plan:
    """All tensors in file order, and further names of shared ones."""

    tensors: tuple[TensorPlan, ...]
    shared: dict[str, str]

    @property
    def packed_weights(self) -> int:
        """Count of weights under a codec other than raw."""
        return sum(math.prod(t.shape) for t in self.tensors if t.packed)

    def totals(self) -> dict[str, float]:
        """Sums: weights, source and stored bytes, bits a weight over packed and over all tensors."""
        packed = [t for t in self.tensors if t.packed]
        weights = sum(math.prod(t.shape) for t in self.tensors)
        stored = sum(t.stored_bytes for t in self.tensors)
        return {
            "tensors": len(self.tensors),
            "packed_tensors": len(packed),
            "weights": weights,
            "packed_weights": self.packed_weights,
            "source_bytes": sum(t.source_bytes for t in self.tensors),
            "stored_bytes": stored,
            "bits_per_packed_weight": 8 * sum(t.stored_bytes for t in packed) / max(1, self.packed_weights),
            "bits_per_weight": 8 * stored / max(1, weights),
        }

    def to_json(self) -> dict[str, Any]:
        """A document that `edited` takes: {"seedpack_plan": 1, "tensors": {name: {"codec", "config"}}}."""
        return {
            "seedpack_plan": PLAN_VERSION,
            "tensors": {t.name: {"codec": t.codec.id, "config": t.codec.spec().config} for t in self.tensors},
        }

    def edited(self, document: object, where: str = "plan") -> Plan:
        """This plan with the codecs that a plan document names; tensors it leaves out stay as they are."""
        version = document.get("seedpack_plan") if isinstance(document, dict) else None
        if not isinstance(document, dict) or type(version) is not int or version != PLAN_VERSION:
            raise ModelError(f"{where}: expected a plan of version {PLAN_VERSION}; make one with --dry-run --json")
        choices = document.get("tensors")
        if not isinstance(choices, dict):
            raise ModelError(f"{where}: 'tensors' must be an object")
        known = {t.name for t in self.tensors}
        if unknown := sorted(choices.keys() - known):
            raise ModelError(f"{where}: names {len(unknown)} tensors that the model has not, as {unknown[0]!r}")
        return replace(self, tensors=tuple(_edit(t, choices.get(t.name), where) for t in self.tensors))

    def edited_by_file(self, path: str | Path) -> Plan:
        """`edited` with a JSON file."""
        try:
            text = Path(path).read_text("utf-8")
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ModelError(f"{path}: is not UTF-8") from None
        return self.edited(loads_strict(text, str(path)), str(path))

    def raw(self, names: Iterable[str], note: str) -> Plan:
        """This plan with some tensors left raw."""
        chosen = set(names)
        return replace(self, tensors=tuple(_left_raw(t, note) if t.name in chosen else t for t in self.tensors))

    def check_experts(self) -> None:
        """Refuse what transformers could not load: experts of one parameter, or of one kind, packed here and raw there."""
        groups: dict[str, set[str]] = {}
        kinds: dict[str, set[bool]] = {}
        for tensor in self.tensors:
            if tensor.group:
                groups.setdefault(tensor.group, set()).add(codec_to_json(tensor.codec))
                kinds.setdefault(tensor.group.rpartition(".")[2], set()).add(tensor.packed)
        uneven = [group for group, codecs in groups.items() if len(codecs) > 1]
        uneven += [kind for kind, packed in kinds.items() if len(packed) > 1]
        if uneven:
            raise ModelError(
                f"experts must be packed alike, but {uneven[0]!r} would be packed by several codecs or only in part; "
                "include or exclude all of its projections in all layers"
            )

    def with_hessians(self, names: Collection[str]) -> Plan:
        """This plan with the codecs of packed tensors that a Hessian is known for as they are to be then."""

        def prepared(tensor: TensorPlan) -> TensorPlan:
            codec = tensor.codec
            if tensor.name not in names or not isinstance(codec, HessianFitting):
                return tensor
            return replace(tensor, codec=codec.with_hessian())

        return replace(self, tensors=tuple(prepared(tensor) for tensor in self.tensors))

    def dumps(self) -> str:
        """The JSON text of `to_json`."""
        return json.dumps(self.to_json(), indent=2) + "\n"


def make_plan(
    tensors: Mapping[str, SourceTensor],
    shared: Mapping[str, str],
    codec: Codec,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
) -> Plan:
    """The default plan: `codec` for every weight matrix that it makes smaller, raw for the rest.

    Args:
        tensors: what the source holds, in file order.
        shared: further names of its tensors.
        codec: for linear layers, embeddings and convolutions.
        include: patterns (fnmatch) of tensor names; given, only matching ones are packed.
        exclude: patterns of tensor names to leave raw.
        dtype: safetensors name of the dtype for raw float tensors and decoded weights; default the source's.
    """
    for pattern in (*include, *exclude):
        if not any(fnmatch.fnmatch(name, pattern) for name in tensors):
            raise ModelError(f"pattern {pattern!r} matches no tensor; names look like {next(iter(tensors))!r}")

    def choose(name: str, tensor: SourceTensor) -> TensorPlan:
        floating = tensor.dtype in PACKABLE
        target = dtype if dtype and floating else tensor.dtype
        source_bytes = nbytes(tensor.dtype, tensor.shape)
        note = ""
        if not floating and not tensor.dtype.startswith("F8"):
            note = "not a float tensor"
        elif not tensor.kind or not floating:
            note = "not the weight matrix of a layer that can be packed"
        elif any(fnmatch.fnmatch(name, p) for p in exclude):
            note = "excluded"
        elif include and not any(fnmatch.fnmatch(name, p) for p in include):
            note = "not included"
        else:
            matrix = codec_matrix(tensor.shape, tensor.transposed)
            bits = codec.bits_per_weight(matrix)
            if codec.parts(matrix)["weight"][1] != tensor.shape and bits < 8 * DTYPE_BYTES[target]:
                return TensorPlan(
                    name, target, tensor.shape, codec, source_bytes, tensor.kind, tensor.transposed, "", tensor.group
                )
            note = f"{codec.id} would take {bits:.1f} bits a weight"
        raw = RawCodec(target)
        return TensorPlan(
            name, target, tensor.shape, raw, source_bytes, tensor.kind, tensor.transposed, note, tensor.group
        )

    plan = Plan(tuple(choose(name, tensor) for name, tensor in tensors.items()), dict(shared))
    if include and not plan.packed_weights:
        wanted = next(t for t in plan.tensors if any(fnmatch.fnmatch(t.name, p) for p in include))
        raise ModelError(f"nothing that --include asks for can be packed: {wanted.name!r} is {wanted.note}")
    return plan


def codec_for(name: str, bits: float | None, settings: Mapping[str, Any]) -> Codec:
    """The codec of the command line: an id, or `svd+ID` for an SVD whose factors are packed by another codec.

    Args:
        name: as "trellis", "svd", "svd+trellis".
        bits: bits a weight; None is the codec's default, 4.
        settings: hyperparameters by name, which win.
    """
    outer, plus, inner = name.partition("+")
    cls: Any = get_codec(outer)
    config = dict(settings)
    if plus:
        if outer != "svd":
            raise CodecError(f"codec {name!r}: only svd takes another codec for its factors, as svd+trellis")
        factor = codec_for(inner, None, {}).spec()
        config["factors"] = factor.to_json()
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(config.keys() - set(known)):
        raise CodecError(f"codec {outer!r} has no setting {unknown[0]!r}; it has: {', '.join(known)}")
    try:
        if outer == "svd" and "rank" not in config:
            config.setdefault("bits", 4.0 if bits is None else bits)
        elif outer == "svd" and bits is not None:
            raise CodecError("codec 'svd': give rank or bits, not both")
        elif bits is not None or not config:
            builder: Callable[..., Codec] | None = getattr(cls, "from_bits", None)
            if bits is not None and builder is None:
                raise CodecError(f"codec {outer!r} has no bits to choose")
            if builder is not None:
                return builder(4.0 if bits is None else bits, **config)
        return cls(**config)  # type: ignore[no-any-return]
    except TypeError as error:
        raise CodecError(f"codec {outer!r}: {str(error).partition('() ')[2] or error}") from None


def _edit(tensor: TensorPlan, choice: object, where: str) -> TensorPlan:
    if choice is None:
        return tensor
    if not isinstance(choice, dict) or choice.keys() != {"codec", "config"}:
        raise ModelError(f"{where}: tensor {tensor.name!r}: expected exactly codec and config")
    try:
        codec = get_codec(str(choice["codec"])).from_config(choice["config"])
    except CodecError as error:
        raise CodecError(f"{where}: tensor {tensor.name!r}: {error}") from None
    if isinstance(codec, RawCodec):
        if codec.dtype != tensor.dtype:
            raise ModelError(
                f"{where}: tensor {tensor.name!r}: raw as {codec.dtype}, but it is {tensor.dtype}; use --dtype"
            )
        return _left_raw(tensor, "by plan file") if tensor.packed else tensor
    if not tensor.kind or tensor.dtype not in PACKABLE:
        raise ModelError(f"{where}: tensor {tensor.name!r} cannot be packed: {tensor.note}")
    return replace(tensor, codec=codec, note="by plan file")


def _left_raw(tensor: TensorPlan, note: str) -> TensorPlan:
    return replace(tensor, codec=RawCodec(tensor.dtype), note=note)
