"""Sources whose weights are in 8 or 4 bits, as the dense tensors that these stand for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from seedpack.converter.sources.base import KindOf, Source, SourceTensor
from seedpack.converter.sources.few_bits import Blocks, FewBits, find_few_bits
from seedpack.converter.sources.kinds import guess_kind
from seedpack.dtypes import TORCH_DTYPES
from seedpack.formats.header import nbytes

ACTIVATION_SCALES = frozenset({  # the last part of their names
    "input_scale", "input_scale_inv", "input_global_scale", "input_zero_point", "activation_scale", "output_scale",
    "output_zero_point", "qscale_act", "q_scale", "k_scale", "v_scale", "kv_scale", "q_zero_point", "k_zero_point",
    "v_zero_point", "kv_cache_scale",
})  # fmt: skip
STACKED = ("_input_scale", "_activation_scale")  # the ends of those of experts in one tensor


class DequantizedSource(Source):
    """The tensors of another source, those in few bits dense.

    Args:
        source: the other one.
        weights: its tensors in few bits, by their dense names.
        dropped: its tensors that no weight is made of.
        kind_of: kind, transposed and group of a dense tensor.
        dtype: of dense tensors.
    """

    def __init__(
        self, source: Source, weights: dict[str, FewBits], dropped: Sequence[str], kind_of: KindOf, dtype: str
    ):
        self._source, self._weights, self._dtype = source, weights, dtype
        dense_names = {weight.parts[0]: name for name, weight in weights.items()}
        left_out = {*dropped, *(part for weight in weights.values() for part in weight.parts[1:])}
        tensors: dict[str, SourceTensor] = {}
        shared: dict[str, str] = {}
        first: dict[tuple[str, ...], str] = {}  # the first dense tensor of the same stored ones
        for stored in (name for name in (*source.tensors, *source.shared) if name not in left_out):
            name = dense_names.get(stored, stored)
            parts = tuple(map(self._stored_name, weights[name].parts if name in weights else [stored]))
            if first.setdefault(parts, name) == name:
                tensors[name] = self._dense_form(name, kind_of) if name in weights else source.tensors[parts[0]]
            else:
                shared[name] = first[parts]
        super().__init__(
            source.name,
            tensors,
            shared=shared,
            config=source.config,
            dropped=[*source.dropped, *dropped],
            files=source.files,
            notes=[*source.notes, *_notes(weights, dtype)],
        )

    @property
    def state(self) -> str:
        """Tells these tensors from others; see `Source`."""
        return self._source.state

    def _read(self, name: str) -> Tensor:
        if name in self._weights:
            return self._weights[name].dense(self._read_stored, TORCH_DTYPES[self._dtype])
        return self._read_stored(name)

    def _read_stored(self, name: str) -> Tensor:
        return self._source._read(self._stored_name(name))

    def _stored_name(self, name: str) -> str:
        return self._source.shared.get(name, name)

    def _dense_form(self, name: str, kind_of: KindOf) -> SourceTensor:
        weight = self._weights[name]
        stored = [self._source.tensors[self._stored_name(part)] for part in weight.parts]
        size = sum(nbytes(tensor.dtype, tensor.shape) for tensor in stored)
        return SourceTensor(self._dtype, weight.shape, *kind_of(name, weight.shape), stored_bytes=size)


def dequantized(
    source: Source,
    kind_of: KindOf = guess_kind,
    dtype: str = "BF16",
    block_sizes: Sequence[Blocks] = (),
    is_quantised: bool = False,
) -> Source:
    """Return a source of dense tensors: the given one, if none of its weights is in few bits.

    Args:
        source: any.
        kind_of: kind, transposed and group of a dense tensor.
        dtype: safetensors name, of what is made dense.
        block_sizes: that the checkpoint's config names.
        is_quantised: the checkpoint's config says so.

    Raises:
        ModelError: weights of a kind that is not read, or scales that are missing or of another form.
    """
    stored = source.named
    weights = find_few_bits(stored, source.name, block_sizes, is_quantised)
    if not weights and not is_quantised:
        return source
    return DequantizedSource(source, weights, _activation_scales(stored, weights, is_quantised), kind_of, dtype)


def _activation_scales(stored: Collection[str], weights: dict[str, FewBits], is_quantised: bool) -> list[str]:
    """Return the names of scales of activations: of layers whose weight is in few bits, or of all that a config tells of."""
    parts = {part for weight in weights.values() for part in weight.parts}
    modules = {"", *(part[:end] for part in parts for end, letter in enumerate(part) if letter == ".")}
    return [
        name
        for name in stored
        if name not in parts
        and (name.rpartition(".")[2] in ACTIVATION_SCALES or name.endswith(STACKED))
        and (is_quantised or name.rpartition(".")[0] in modules)
    ]


def _notes(weights: dict[str, FewBits], dtype: str) -> list[str]:
    """Return a line for each kind of numbers: "float8 (blocks of 128x128), dequantised to BF16"."""
    layouts: dict[str, dict[str, None]] = {}
    for weight in weights.values():
        kind, layout = weight.label
        layouts.setdefault(kind, {})[layout] = None
    return [f"{kind} ({', '.join(found)}), dequantised to {dtype}" for kind, found in layouts.items()]
