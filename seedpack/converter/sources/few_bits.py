"""Weights of 8 or 4 bits: found by the names, dtypes and shapes of their tensors, and made dense one at a time."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seedpack.converter.sources.base import SourceTensor
from seedpack.dtypes import PACKABLE
from seedpack.errors import ModelError

Blocks = tuple[int, ...]
Read = Callable[[str], Tensor]

FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
EXPONENTS = frozenset({"F8_E8M0", "U8"})  # scales that are powers of two
FETCH = "fetch the whole checkpoint again, or start from the dense model"
WEIGHTS = ("weight", "_proj")  # the ends of names of integers that are weights
FOREIGN = {  # ends of names, and the dtypes that their tensors have, of weights that are not read
    re.compile(r"\.qweight$"): ({"I32", "I16", "U8", "I8"}, "GPTQ or AWQ"),
    re.compile(r"_packed$"): ({"I32", "U8", "I8"}, "compressed-tensors, in packed integers or NVFP4"),
    re.compile(r"\.(weight_)?bitmask$"): ({"U8", "I32", "BOOL"}, "compressed-tensors, sparse"),
    re.compile(r"\.weight_g_idx$"): ({"I32", "I64"}, "compressed-tensors, in groups of permuted channels"),
    re.compile(r"\.SCB$"): ({"F32", "F16", "BF16"}, "bitsandbytes, in 8 bits"),
    re.compile(r"\.weight\.(absmax|quant_map|quant_state\..*)$"): ({"F32", "U8"}, "bitsandbytes, in 4 bits"),
    re.compile(r"\.W_q$"): ({"U8", "I8", "I32"}, "HQQ"),
    re.compile(r"\.pre_quant_scale$"): ({"F32", "F16", "BF16"}, "modelopt, with scales of activations in its weights"),
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class FewBits(ABC):
    """A dense tensor that is stored in few bits.

    Attributes:
        where: the source, for messages.
        parts: the names of the stored tensors that it is made of, the principal one first.
        shape: of the dense tensor.
    """

    where: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    @abstractmethod
    def label(self) -> tuple[str, str]:
        """The numbers that weights are stored in, and what shares a scale."""

    @abstractmethod
    def dense(self, read: Read, dtype: torch.dtype) -> Tensor:
        """Return the dense tensor: a product in float32, then cast."""

    def _scales(self, read: Read, name: str) -> Tensor:
        """Return scales in float32, which must be finite."""
        stored = read(name)
        scales = (stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored).float()
        if bad := int((~torch.isfinite(scales)).sum()):
            raise ModelError(
                f"{self.where}: tensor {name!r}: {bad} of {scales.numel()} scales are NaN or Inf, expected finite ones; {FETCH}"
            )
        return scales


@dataclass(frozen=True)
class ScaledWeight(FewBits):
    """A weight times a scale for each block: `parts` are the weight, the scale and, if there are some, zero points.

    Attributes:
        kind: float8 or int8.
        blocks: the size of a block along each axis.
    """

    kind: str
    blocks: Blocks

    @property
    def label(self) -> tuple[str, str]:
        """The numbers that weights are stored in, and what shares a scale."""
        if all(block >= size for block, size in zip(self.blocks, self.shape, strict=True)):
            return self.kind, "one scale per tensor"
        if self.blocks[:-1] == (1,) * len(self.blocks[:-1]) and self.blocks[-1] >= self.shape[-1]:
            return self.kind, "one scale per row"
        return self.kind, f"blocks of {'x'.join(map(str, self.blocks[-2:]))}"

    def dense(self, read: Read, dtype: torch.dtype) -> Tensor:
        """Return the dense tensor: a product in float32, then cast."""
        weight, scale = read(self.parts[0]), self._scales(read, self.parts[1])
        zero = read(self.parts[2]).float() if len(self.parts) > 2 else None
        return scaled(weight, scale, self.blocks, dtype, zero)


@dataclass(frozen=True)
class Mxfp4Weight(FewBits):
    """Numbers E2M1, two per byte, in groups of 32 along the input with an exponent for each; the dense tensor is transposed.

    `parts` are the blocks, uint8 [experts, out, groups, 16], and the exponents, uint8 [experts, out, groups], of bias 127.
    """

    @property
    def label(self) -> tuple[str, str]:
        """The numbers that weights are stored in, and what shares a scale."""
        return "MXFP4", "groups of 32"

    def dense(self, read: Read, dtype: torch.dtype) -> Tensor:
        """Return the dense tensor [experts, in, out]: a product in float32, then cast."""
        blocks, scales = read(self.parts[0]), self._scales(read, self.parts[1])
        low = torch.tensor(E2M1, dtype=torch.float32).repeat(16)
        high = torch.tensor(E2M1).repeat_interleave(16)
        pairs = torch.stack([low, high], dim=-1)  # of every byte
        dense = torch.empty(self.shape, dtype=dtype)
        for expert_blocks, expert_scales, matrix in zip(blocks, scales, dense, strict=True):
            values = pairs[expert_blocks.int()].flatten(-2) * expert_scales.unsqueeze(-1)
            matrix.copy_(values.flatten(-2).mT)
        return dense


def scaled(weight: Tensor, scale: Tensor, blocks: Blocks, dtype: torch.dtype, zero: Tensor | None = None) -> Tensor:
    """Return (weight - zero) · scale, where each block of the weight has one scale: computed in float32, then cast.

    >>> scaled(torch.ones(2, 3), torch.tensor([[2.0, 4.0]]), (2, 2), torch.float32)
    tensor([[2., 2., 4.],
            [2., 2., 4.]])
    """
    shape, padding = weight.shape, (1,) * (2 - weight.dim())
    weight, blocks = weight.reshape(*padding, *shape), (*padding, *blocks)
    counts = [-(-size // block) for size, block in zip(weight.shape, blocks, strict=True)]

    def spread(values: Tensor) -> Tensor:
        """Return values for every axis but that of rows, [matrices, blocks of rows, columns]."""
        values = values.reshape(counts)
        for axis in [*range(weight.dim() - 2), weight.dim() - 1]:
            values = values.repeat_interleave(blocks[axis], axis).narrow(axis, 0, weight.shape[axis])
        return values.reshape(-1, *values.shape[-2:])

    rows, columns = weight.shape[-2:]
    scales, zeros = spread(scale), None if zero is None else spread(zero)
    matrices = weight.reshape(-1, rows, columns)
    dense = torch.empty(matrices.shape, dtype=dtype)
    for number in range(len(matrices)):
        for index in torch.arange(rows).split(max(1, WEIGHTS_AT_ONCE // max(1, columns))):
            values = matrices[number, index[0] : index[-1] + 1].float()
            if zeros is not None:
                values -= zeros[number, index // blocks[-2]]
            dense[number, index[0] : index[-1] + 1] = values * scales[number, index // blocks[-2]]
    return dense.reshape(shape)


def find_few_bits(
    tensors: Mapping[str, SourceTensor], where: str, block_sizes: Sequence[Blocks] = (), is_quantised: bool = False
) -> dict[str, FewBits]:
    """Return the dense tensors that are stored in few bits, by their names.

    Args:
        tensors: as stored.
        where: the source, for messages.
        block_sizes: that the checkpoint's config names; without one, shapes tell.
        is_quantised: what comes with the tensors says so: then float8 without a scale is refused, too.

    Raises:
        ModelError: weights of a kind that is not read, or scales that are missing or of another form.
    """
    _refuse_foreign(tensors, where)
    weights: dict[str, FewBits] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in FLOAT8 or (tensor.dtype == "I8" and name.endswith(WEIGHTS)):
            if scale := _scale_of(name, tensor, tensors):
                weights[name] = _scaled_weight(name, scale, tensors, where, block_sizes)
        elif name.endswith("_blocks") and tensor.dtype == "U8" and len(tensor.shape) >= 3:
            weights[name.removesuffix("_blocks")] = _mxfp4_weight(name, tensors, where)
    parts = {part for weight in weights.values() for part in weight.parts}
    plain = [name for name, tensor in tensors.items() if tensor.dtype in FLOAT8 and name not in parts]
    if is_quantised:
        plain += [name for name, t in tensors.items() if t.dtype == "I8" and len(t.shape) > 1 and name not in parts]
    if plain and (weights or is_quantised):
        raise ModelError(
            f"{where}: tensor {plain[0]!r}: is {tensors[plain[0]].dtype} without a scale, as are {len(plain) - 1} more; "
            f"expected {plain[0] + '_scale_inv'!r} or {plain[0] + '_scale'!r} beside it: {FETCH}"
        )
    return weights


def _refuse_foreign(tensors: Mapping[str, SourceTensor], where: str) -> None:
    """Refuse weights that are packed in ways that are not read: nothing in them would be a weight."""
    for name, tensor in tensors.items():
        method = next((m for end, (dtypes, m) in FOREIGN.items() if tensor.dtype in dtypes and end.search(name)), "")
        scale = tensors.get(f"{name}_scale", tensors.get(_sibling(name, "scale")))
        is_weight = scale is not None and name.endswith(WEIGHTS)
        if is_weight and tensor.dtype == "U8":
            method = "two weights of 4 bits per byte, as NVFP4"
        if is_weight and tensor.dtype == "I8" and scale is not None and scale.dtype in EXPONENTS:
            method = "two weights of 4 bits per byte, as MXFP4"
        if method:
            raise ModelError(
                f"{where}: tensor {name!r}: is quantised already ({method}); start from the dense model, or from one in "
                "float8, int8 or MXFP4 with its scales"
            )


def _sibling(name: str, leaf: str) -> str:
    return f"{name.rpartition('.')[0]}.{leaf}"


def _scale_of(name: str, tensor: SourceTensor, tensors: Mapping[str, SourceTensor]) -> str:
    """Return the name of a weight's scale, or "" where there is none."""
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if tensor.dtype in FLOAT8 and name.endswith(".weight"):
        names.append(_sibling(name, "qscale_weight"))
        blocks = tensors.get(_sibling(name, "scale"))
        if blocks is not None and len(blocks.shape) == 2:  # any other could be a parameter of the layer
            names.append(_sibling(name, "scale"))
    return next((scale for scale in names if scale in tensors), "")


def _scaled_weight(
    name: str, scale: str, tensors: Mapping[str, SourceTensor], where: str, block_sizes: Sequence[Blocks]
) -> ScaledWeight:
    weight, zero = tensors[name], f"{name}_zero_point"
    allowed = PACKABLE | EXPONENTS if weight.dtype in FLOAT8 else PACKABLE
    if tensors[scale].dtype not in allowed:
        raise ModelError(
            f"{where}: tensor {scale!r}: is {tensors[scale].dtype}, expected one of {', '.join(sorted(allowed))} as the scale "
            f"of {name!r}; {FETCH}"
        )
    blocks = blocks_of(weight.shape, tensors[scale].shape, block_sizes)
    if blocks is None or (zero in tensors and tensors[zero].shape != tensors[scale].shape):
        wrong = scale if blocks is None else zero
        raise ModelError(
            f"{where}: tensor {wrong!r}: has shape {list(tensors[wrong].shape)} for {name!r} {list(weight.shape)}, expected "
            f"{_expected(weight.shape, block_sizes) if blocks is None else f'that of {scale!r}'}; {FETCH}"
        )
    parts = (name, scale, zero) if zero in tensors else (name, scale)
    return ScaledWeight(where, parts, weight.shape, "float8" if weight.dtype in FLOAT8 else "int8", blocks)


def _expected(shape: tuple[int, ...], block_sizes: Sequence[Blocks]) -> str:
    """Return which shapes of a scale go with a weight, in words."""
    known = [
        f"{[*shape[: -len(sizes)], *(-(-n // size) for n, size in zip(shape[-len(sizes) :], sizes, strict=True))]}"
        f" for blocks of {'x'.join(map(str, sizes))}"
        for sizes in block_sizes
        if len(sizes) <= len(shape)
    ]
    return " or ".join([*known, "one scale per tensor, row or block"][: max(1, len(known))])


def blocks_of(shape: tuple[int, ...], scales: tuple[int, ...], block_sizes: Sequence[Blocks] = ()) -> Blocks | None:
    """Return the size along each axis of the blocks that have a scale each, or None where shapes do not go together.

    Sizes that are not named are told by the counts of blocks: a power of two, the last block cut off if need be, or
    else what divides the axis evenly.

    Args:
        shape: of the weight.
        scales: the shape of its scales: of one number, of the weight's first axes, or of all its axes.
        block_sizes: along the last axes, that the checkpoint's config names.

    >>> blocks_of((576, 256), (5, 2)), blocks_of((8, 6), (8, 1)), blocks_of((8, 6), ()), blocks_of((8, 6), (3, 3))
    ((128, 128), (1, 6), (8, 6), None)
    """
    if scales in ((), (1,)):
        return shape
    if len(scales) > len(shape):
        return None
    is_per_row = scales + (1,) * (len(shape) - len(scales)) == (*shape[:-1], 1)
    counts = scales + (1,) * (len(shape) - len(scales))
    for sizes in block_sizes:
        blocks = (1,) * (len(shape) - len(sizes)) + sizes
        if len(blocks) == len(shape) and tuple(map(_block_count, shape, blocks)) == counts:
            return blocks
    if block_sizes and len(scales) > 1 and not is_per_row:
        return None
    leading = zip(shape[:-2], counts[:-2], strict=True)
    found = [n if count == 1 else 1 if count == n else None for n, count in leading]
    found += [_block_size(n, count) for n, count in zip(shape[-2:], counts[-2:], strict=True)]
    blocks = tuple(size for size in found if size is not None)
    return blocks if len(blocks) == len(shape) else None


def _block_count(size: int, block: int) -> int:
    return -(-size // block)


def _block_size(size: int, count: int) -> int | None:
    """Return the size of `count` blocks that fill an axis."""
    if count == 1:
        return size
    powers = (1 << exponent for exponent in range(size.bit_length()))
    power = next((block for block in powers if _block_count(size, block) == count), None)
    even = size // count if count and size % count == 0 and count <= size else None
    return power if power is not None else even


def _mxfp4_weight(name: str, tensors: Mapping[str, SourceTensor], where: str) -> Mxfp4Weight:
    dense = name.removesuffix("_blocks")
    scales, shape = f"{dense}_scales", tensors[name].shape
    if len(shape) != 4 or shape[-1] != 16:
        raise ModelError(
            f"{where}: tensor {name!r}: has shape {list(shape)}, expected [experts, out, groups, 16]: two weights of MXFP4 per "
            f"byte; {FETCH}"
        )
    if scales not in tensors:
        raise ModelError(
            f"{where}: tensor {name!r}: is MXFP4 without its scales, expected {scales!r} beside it: {FETCH}"
        )
    if dense in tensors:
        raise ModelError(f"{where}: tensor {name!r}: stands beside {dense!r}, the same weight; remove one of them")
    found = tensors[scales]
    if found.dtype not in EXPONENTS or found.shape != shape[:-1]:
        raise ModelError(
            f"{where}: tensor {scales!r}: is {found.dtype} {list(found.shape)} for {name!r} {list(shape)}, expected U8 "
            f"{list(shape[:-1])}; {FETCH}"
        )
    return Mxfp4Weight(where, (name, scales), (shape[0], 32 * shape[2], shape[1]))
