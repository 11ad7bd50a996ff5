"""The plan: a codec for each tensor. Pure data, that can be printed, edited and given back."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seedpack.codecs.base import Codec
from seedpack.codecs.interfaces import HessianFitting, Rates
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.registry import codec_to_json, get_codec
from seedpack.codecs.stack import StackCodec
from seedpack.converter.sources.base import SourceTensor
from seedpack.dtypes import PACKABLE
from seedpack.errors import CodecError, ModelError
from seedpack.formats import PlannedTensor
from seedpack.formats.header import DTYPE_BYTES, loads_strict
from seedpack.formats.manifest import part_key
from seedpack.loader.layers import codec_matrix
from seedpack.units import count

PLAN_VERSION = 1


@dataclass(frozen=True)
class TensorPlan:
    """One tensor with its codec, and a note that says why it is raw."""

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
        """True if any codec but raw is used."""
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

    def with_hessian(self) -> TensorPlan:
        """Return this tensor with its codec as it is to be where a Hessian is known."""
        return replace(self, codec=self.codec.with_hessian()) if isinstance(self.codec, HessianFitting) else self

    def for_writer(self) -> PlannedTensor:
        """Return what the format writer needs."""
        parts = self.codec.parts(self.codec_shape)
        return PlannedTensor(
            self.name, self.codec.spec(), self.dtype, self.shape, parts, self.packed and self.transposed
        )


@dataclass(frozen=True)
class Plan:
    """All tensors in file order, further names of shared ones, and the dtype of floats where it is not the source's."""

    tensors: tuple[TensorPlan, ...]
    shared: dict[str, str]
    dtype: str | None = None

    @property
    def packed_weights(self) -> int:
        """Count of weights under a codec other than raw."""
        return sum(math.prod(t.shape) for t in self.tensors if t.packed)

    def totals(self) -> dict[str, float]:
        """Return sums: weights, source and stored bytes, bits per weight over packed and over all tensors."""
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

    def has_most_bits(self) -> bool:
        """Return whether no packed tensor's codec has a variant of more bits."""
        packed = {codec_to_json(tensor.codec): tensor.codec for tensor in self.tensors if tensor.packed}
        return all(codec == codec.variants()[-1] for codec in packed.values() if isinstance(codec, Rates))

    def raw_shares(self) -> dict[str, float]:
        """Return the share of the weights that stays raw for each reason, largest first."""
        floats = [tensor for tensor in self.tensors if tensor.dtype in PACKABLE]
        total, counts = max(1, sum(math.prod(t.shape) for t in floats)), Counter[str]()
        for tensor in floats:
            if not tensor.packed:
                counts[tensor.note] += math.prod(tensor.shape)
        return {note: count / total for note, count in counts.most_common() if count}

    def to_json(self) -> dict[str, Any]:
        """Return a document that `edited` takes: {"seedpack_plan": 1, "tensors": {name: {"codec", "config"}}}."""
        return {
            "seedpack_plan": PLAN_VERSION,
            "tensors": {t.name: {"codec": t.codec.id, "config": t.codec.spec().config} for t in self.tensors},
        }

    def edited(self, document: object, where: str = "plan") -> Plan:
        """Return this plan with the codecs that a plan document names; tensors it leaves out stay as they are."""
        version = document.get("seedpack_plan") if isinstance(document, dict) else None
        if not isinstance(document, dict) or type(version) is not int or version != PLAN_VERSION:
            raise ModelError(f"{where}: expected a plan of version {PLAN_VERSION}; make one with --dry-run --json")
        choices = document.get("tensors")
        if not isinstance(choices, dict):
            raise ModelError(f"{where}: 'tensors' must be an object")
        if unknown := sorted(choices.keys() - {t.name for t in self.tensors}):
            raise ModelError(
                f"{where}: names {count(len(unknown), 'tensor')} that the model does not have, such as {unknown[0]!r}"
            )
        return replace(self, tensors=tuple(_edit(t, choices.get(t.name), where) for t in self.tensors))

    def edited_by_file(self, path: str | Path) -> Plan:
        """Return this plan with the codecs that a JSON file names."""
        try:
            text = Path(path).read_text("utf-8")
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ModelError(f"{path}: is not UTF-8") from None
        return self.edited(loads_strict(text, str(path)), str(path))

    def raw(self, notes: Mapping[str, str]) -> Plan:
        """Return this plan with some tensors left raw, {name: why}."""
        return replace(self, tensors=tuple(_left_raw(t, notes[t.name]) if t.name in notes else t for t in self.tensors))

    def require_source(self, tensors: Mapping[str, SourceTensor]) -> None:
        """Refuse to be followed for a source of other tensors.

        Raises:
            ModelError: naming a tensor that is missing, or of another form.
        """
        planned = {t.name: (t.dtype, t.shape, t.kind, t.transposed, t.group) for t in self.tensors}
        source = {
            name: (self._dtype_of(t), t.shape, t.kind, _seen_transposed(t), t.group) for name, t in tensors.items()
        }
        if names := sorted(n for n in planned.keys() | source.keys() if planned.get(n) != source.get(n)):
            raise ModelError(
                f"the plan is for another model: {names[0]!r} is {planned.get(names[0])} in the plan, "
                f"{source.get(names[0])} in the model"
            )

    def _dtype_of(self, tensor: SourceTensor) -> str:
        return self.dtype if self.dtype and tensor.dtype in PACKABLE else tensor.dtype

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
        """Return this plan with the codecs of some tensors as they are to be where a Hessian is known."""
        return replace(self, tensors=tuple(t.with_hessian() if t.name in names else t for t in self.tensors))

    def quick(self) -> Plan:
        """Return this plan with codecs that are fitted sooner, to measure what errors cost."""
        return replace(
            self,
            tensors=tuple(replace(t, codec=t.codec.quick()) if isinstance(t.codec, Rates) else t for t in self.tensors),
        )

    def dumps(self) -> str:
        """Return the JSON text of `to_json`."""
        return json.dumps(self.to_json(), indent=2) + "\n"


def default_plan(
    tensors: Mapping[str, SourceTensor],
    shared: Mapping[str, str],
    codec: Codec,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
) -> Plan:
    """Plan `codec` for every weight matrix that it makes smaller, and raw for the rest.

    Args:
        tensors: of the source, in file order.
        shared: further names of its tensors.
        codec: for linear layers, embeddings, convolutions and other matrices; of stacks of matrices, for each of them.
        include: patterns (fnmatch) of tensor names; given, only matching ones are packed.
        exclude: patterns of tensor names to leave raw.
        dtype: safetensors name of the dtype for raw float tensors and decoded weights; default the source's.
    """
    for pattern in (*include, *exclude):
        if not any(fnmatch.fnmatch(name, pattern) for name in tensors):
            raise ModelError(f"pattern {pattern!r} matches no tensor; names look like {next(iter(tensors))!r}")

    def plan_tensor(name: str, tensor: SourceTensor) -> TensorPlan:
        target = dtype if dtype and tensor.dtype in PACKABLE else tensor.dtype
        chosen = _stacked(codec, tensor)
        note = _not_packable(tensor) or _not_wanted(name, include, exclude) or _not_smaller(tensor, chosen, target)
        note = note or _name_taken(name, tensor, chosen, {*tensors, *shared} - {name})
        return TensorPlan(
            name=name,
            dtype=target,
            shape=tensor.shape,
            codec=RawCodec(target) if note else chosen,
            source_bytes=tensor.source_bytes,
            kind=tensor.kind,
            transposed=_seen_transposed(tensor),
            note=note,
            group=tensor.group,
        )

    plan = Plan(tuple(plan_tensor(name, tensor) for name, tensor in tensors.items()), dict(shared), dtype)
    if include and not plan.packed_weights:
        wanted = next(t for t in plan.tensors if any(fnmatch.fnmatch(t.name, p) for p in include))
        raise ModelError(f"nothing that --include asks for can be packed: {wanted.name!r} is {wanted.note}")
    return plan


def _not_packable(tensor: SourceTensor) -> str:
    """Return why a tensor cannot be packed; "" if it can."""
    if tensor.dtype not in PACKABLE and not tensor.dtype.startswith("F8"):
        return "not a float tensor"
    if 0 in tensor.shape:
        return "has no elements"
    if not tensor.kind or tensor.dtype not in PACKABLE:
        return tensor.note or ("no matrix" if len(tensor.shape) < 2 else "not the weight of a layer that can be packed")
    return ""


def _stacked(codec: Codec, tensor: SourceTensor) -> Codec:
    """Return the codec of a tensor, which packs each matrix of a stack by `codec`."""
    if not tensor.kind or not tensor.stacked or isinstance(codec, StackCodec):
        return codec
    return StackCodec.over(codec, *tensor.shape[-2:], transposed=tensor.transposed)


def _seen_transposed(tensor: SourceTensor) -> bool:
    """Return whether the codec is given all of a tensor transposed; a stack's codec does that itself."""
    return tensor.transposed and not tensor.stacked


def _not_wanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> str:
    """Return why a tensor is not to be packed; "" if it is."""
    if any(fnmatch.fnmatch(name, pattern) for pattern in exclude):
        return "excluded"
    return "not included" if include and not any(fnmatch.fnmatch(name, pattern) for pattern in include) else ""


def _not_smaller(tensor: SourceTensor, codec: Codec, dtype: str) -> str:
    """Return how many bits a codec would take, if that is no fewer than the raw tensor's; else ""."""
    matrix = codec_matrix(tensor.shape, _seen_transposed(tensor))
    bits = codec.bits_per_weight(matrix)
    if codec.parts(matrix)["weight"][1] != tensor.shape and bits < 8 * DTYPE_BYTES[dtype]:
        return ""
    return f"{codec.id} would take {bits:.1f} bits per weight"


def _name_taken(name: str, tensor: SourceTensor, codec: Codec, others: Collection[str]) -> str:
    """Return which name of a part another tensor of the model has; "" if none."""
    keys = (part_key(name, part) for part in codec.parts(codec_matrix(tensor.shape, _seen_transposed(tensor))))
    taken = next((key for key in keys if key in others), "")
    return f"{taken!r} is a tensor of the model, and would be a part of this one" if taken else ""


def codec_for(name: str, bits: float | None, settings: Mapping[str, Any]) -> Codec:
    """Return the codec of an id, or of `svd+ID`, an SVD whose factors are packed by another codec.

    Args:
        name: as "trellis", "svd", "svd+trellis".
        bits: bits per weight; None is the codec's default, 4.
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
        elif bits is not None or not config.keys() - {"seed", "key"}:  # which choose no rate
            builder: Callable[..., Codec] | None = getattr(cls, "from_bits", None)
            if bits is not None and builder is None:
                raise CodecError(
                    f"codec {outer!r} does not take bits; set its own settings (seedpack codecs lists them)"
                )
            if builder is not None:
                return builder(4.0 if bits is None else bits, **config)
        return cls(**config)  # type: ignore[no-any-return]
    except TypeError as error:
        raise CodecError(f"codec {outer!r}: {str(error).partition('() ')[2] or error}") from None


def _edit(tensor: TensorPlan, choice: object, where: str) -> TensorPlan:
    if choice is None:
        return tensor
    if choice == {"codec": RawCodec.id}:
        choice = {"codec": RawCodec.id, "config": {"dtype": tensor.dtype}}
    if not isinstance(choice, dict) or choice.keys() != {"codec", "config"}:
        raise ModelError(f"{where}: tensor {tensor.name!r}: expected codec and config, or raw alone")
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
