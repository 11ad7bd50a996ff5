"""Quantisers a user would pick instead: the peers' own quantisers where their package is installed, else their arithmetic.

Each takes a weight [out, in] and gives it back as the peer would rebuild it, and the bits per weight that it stores.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Quantiser = Callable[[Tensor], tuple[Tensor, float]]

# NF4's levels, as published with QLoRA (Dettmers et al., arXiv 2305.14314, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4(weight: Tensor, group: int = 64) -> tuple[Tensor, float]:
    """bitsandbytes' NF4 with double quantisation of the scales: 4 + 8/64 + 32/(64·256) = 4.127 bits."""
    blocks = weight.reshape(-1, group)
    scale = blocks.abs().amax(1, keepdim=True)
    chunks = scale.flatten().split(256)
    doubled = []
    for chunk in chunks:  # int8 of the scales less their mean, one float32 for 256 of them
        mean = scale.mean()
        step = (chunk - mean).abs().amax() / 127
        doubled.append((chunk - mean).div(step).round() * step + mean)
    scale = torch.cat(doubled)[:, None]
    index = (blocks / scale)[..., None].sub(NF4).abs().argmin(-1)
    return (NF4[index] * scale).view(weight.shape), 4 + 8 / group + 32 / (group * 256)


def rtn(weight: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """Round to nearest between minimum and maximum of each group, with fp16 scale and offset."""
    blocks = weight.reshape(-1, group)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float()
    low = low.half().float()
    codes = ((blocks - low) / step).round().clamp(0, 2**bits - 1)
    return (codes * step + low).view(weight.shape), bits + 32 / group


def rtn_clipped(weight: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """Symmetric rounding with the fp16 scale of least squared error among 40 clippings of each group."""
    blocks = weight.reshape(-1, group)
    half = 2 ** (bits - 1)
    top = blocks.abs().amax(1, keepdim=True)
    best = torch.full_like(top, torch.inf)
    result = torch.zeros_like(blocks)
    for clip in torch.linspace(0.5, 1.1, 40):
        step = (top * clip / (half - 0.5)).half().float()
        candidate = (blocks / step).round().clamp(-half, half - 1) * step
        error = (candidate - blocks).square().sum(1, keepdim=True)
        result = torch.where(error < best, candidate, result)
        best = torch.minimum(error, best)
    return result.view(weight.shape), bits + 16 / group


def bitsandbytes_nf4(weight: Tensor) -> tuple[Tensor, float]:
    """bitsandbytes' own NF4, blocks of 64 of the flattened weight with double quantisation.

    (Its CPU code rebuilds matrices wrongly whose rows are no multiple of 64.)
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.flatten(), blocksize=64, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(codes, state).view(weight.shape).to(weight.dtype), 4 + 8 / 64 + 32 / (64 * 256)


def hqq(weight: Tensor, bits: int, group: int = 64) -> tuple[Tensor, float]:
    """HQQ's own solver, fp16 scale and zero of each group."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group, axis=1, compute_dtype=torch.float32, device="cpu", bitpack=False
    )
    for name in ("scale", "zero"):
        meta[name] = meta[name].half().float()
    return Quantizer.dequantize(codes, meta).view(weight.shape), bits + 32 / group


def torchao_int4(weight: Tensor, group: int = 64) -> tuple[Tensor, float]:
    """torchao's int4 weight-only arithmetic (tinygemm's: asymmetric, zero point in the middle of the range, bf16)."""
    from torchao.quantization.utils import get_groupwise_affine_qparams, groupwise_affine_quantize_tensor_from_qparams
    from torchao.quantization.utils import groupwise_affine_dequantize_tensor_from_qparams as rebuild

    scales, zeros = get_groupwise_affine_qparams(weight, 4, group, torch.bfloat16)
    codes = groupwise_affine_quantize_tensor_from_qparams(weight, scales, zeros, 4, group)
    if codes.shape != weight.shape:  # two to a byte
        codes = torch.stack((codes >> 4, codes & 15), -1).flatten(1).to(torch.int32)
    return rebuild(codes, scales, zeros, 4, group).to(weight.dtype), 4 + 32 / group


GGML_TYPES = {
    "Q4_0": 2, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ3_XXS": 18, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23,
}  # fmt: skip


class _TypeTraits(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64),
        ("bytes", ctypes.c_size_t), ("quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
    ]  # fmt: skip


@functools.cache
def _ggml() -> ctypes.CDLL:
    """llama.cpp's own quantisers, from the wheel `xllamacpp`."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("*.so"))))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def in_blocks(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
    """Return a weight's values one after the other, filled up to whole rows of blocks of 256, the length of such a row, and the
    importance of its values."""
    row = 256 if importance is None else math.lcm(256, weight.shape[1])
    matrix = None if importance is None else importance.float().repeat(row // weight.shape[1]).contiguous()
    source = weight.float().flatten()
    return torch.nn.functional.pad(source, (0, -source.numel() % row)).contiguous(), row, matrix


def ggml(weight: Tensor, kind: str, importance: Tensor | None = None) -> tuple[Tensor, float]:
    """A GGUF type, over blocks of 256 of the flattened weight; with an importance of each column [in] if it is given.

    (llama.cpp falls back to other types where rows are no multiple of 256; flattened, each type keeps its own bits.)
    """
    library, number = _ggml(), GGML_TYPES[kind]
    source, row, matrix = in_blocks(weight, importance)
    traits = library.ggml_get_type_traits(number).contents
    rows = source.numel() // row
    packed = torch.empty(source.numel() // traits.block * traits.bytes, dtype=torch.uint8)
    given = None if matrix is None else matrix.data_ptr()
    library.ggml_quantize_chunk(number, source.data_ptr(), packed.data_ptr(), 0, rows, row, given)
    rebuilt = torch.empty_like(source)
    to_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)
    to_float(packed.data_ptr(), rebuilt.data_ptr(), source.numel())
    return rebuilt[: weight.numel()].view(weight.shape).to(weight.dtype), 8 * traits.bytes / traits.block


MIXES = ("Q4_K_M", "Q3_K_M", "IQ3_M")


def mixed(name: str, mix: str, layers: int) -> str:
    """Return the type that a mix of llama.cpp gives a weight of one of so many decoder layers, by the rules of its quantiser
    (`llama_tensor_get_type`) for dense models with few query heads to a key."""
    layer = next(int(part) for part in name.split(".") if part.isdigit())
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    value, down, output = (leaf in name for leaf in ("v_proj", "down_proj", "o_proj"))
    if mix == "Q4_K_M":
        return "Q6_K" if (value or down) and more else "Q4_K"
    if mix == "Q3_K_M":
        if value or down:
            return "Q5_K" if layer < (2 if value else layers // 16) else "Q4_K"
        return "Q4_K" if output else "Q3_K"
    return "Q4_K" if value or output or (down and layer < layers // 8) else "IQ3_S"


def higgs(weight: Tensor, bits: int) -> tuple[Tensor, float]:
    """HIGGS' arithmetic with transformers' own grids: pairs of weights, rotated in blocks, on the grid of least squared error.

    Blocks are the largest power of two that divides the rows, up to 1024 (its kernel wants 1024), with a scale of 16 bits each.
    """
    from transformers.integrations.higgs import get_higgs_grid

    grid = get_higgs_grid(2, 4**bits).to(weight.dtype)
    size = min(1024, weight.shape[1] & -weight.shape[1])
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1))) / math.sqrt(2)
    blocks = weight.reshape(-1, size) @ matrix
    scale = blocks.square().mean(1, keepdim=True).sqrt().half().float()
    pairs = (blocks / scale.clamp_min(1e-30)).view(-1, 2)
    nearest = torch.cat([(2 * some @ grid.T - grid.square().sum(1)).argmax(1) for some in pairs.split(1 << 16)])
    return ((grid[nearest].view(blocks.shape) * scale) @ matrix).view(weight.shape), bits + 16 / size


def sinq(weight: Tensor, bits: int, group: int = 64) -> tuple[Tensor, float]:
    """SINQ's own quantiser: groups within rows, after scales of rows and columns that even their deviations out.

    A group has 16 bits of scale and 8 of zero point, a column 16. It takes smaller groups where these do not divide rows.
    """
    from sinq.dual_shift import tiled_quant_rectangle

    codes, rows, columns, zeros = tiled_quant_rectangle(weight, (0, 2**bits - 1), group, method="sinq")
    rebuilt = ((codes - zeros) * rows).view(weight.shape) * columns
    return rebuilt, bits + 24 * rows.numel() / weight.numel() + 16 / weight.shape[0]


def data_free() -> dict[str, tuple[str, Quantiser]]:
    """Every data-free peer at hand: name to (family, quantiser). Families are drawn as one line each."""
    found: dict[str, tuple[str, Quantiser]] = {}
    for group in (64, 128):
        for bits in (2, 3, 4):
            label = f"round to nearest, min/max, g{group}"
            found[f"{label}, {bits} bits"] = (label, functools.partial(rtn, bits=bits, group=group))
    if importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes NF4"] = ("bitsandbytes NF4", bitsandbytes_nf4)
    else:
        found["NF4 (its arithmetic)"] = ("bitsandbytes NF4", nf4)
    if importlib.util.find_spec("hqq"):
        for bits in (2, 3, 4):
            found[f"HQQ g64, {bits} bits"] = ("HQQ g64", functools.partial(hqq, bits=bits))
    for bits in (2, 3, 4):
        found[f"HIGGS, {bits} bits"] = ("HIGGS", functools.partial(higgs, bits=bits))
    if importlib.util.find_spec("sinq"):
        for bits in (2, 3, 4):
            found[f"SINQ g64, {bits} bits"] = ("SINQ g64", functools.partial(sinq, bits=bits))
    if importlib.util.find_spec("torchao"):
        found["torchao int4 g64"] = ("torchao int4 g64", torchao_int4)
    if importlib.util.find_spec("xllamacpp"):
        for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q4_0"):
            family = (
                "GGUF i-quants" if kind.startswith("IQ") else "GGUF K-quants" if kind.endswith("K") else "GGUF Q4_0"
            )
            found[f"GGUF {kind}"] = (family, functools.partial(ggml, kind=kind))
    return found


def versions() -> str:
    """Name the versions of the peers' packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("bitsandbytes", "hqq", "torchao", "xllamacpp", "sinq", "auto-round"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found) or "none installed"


@torch.no_grad()
def replace_weights(model: torch.nn.Module, quantise: Quantiser) -> tuple[float, float]:
    """Every linear, convolution and embedding weight of a model replaced by its rebuilt form; shared ones once.

    A weight that the peer's groups do not divide stays as it is, and counts 16 bits.

    Returns:
        Bits per weight, and the relative error in dB.
    """
    error = energy = stored = weights = 0.0
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d)
    for weight in {id(m.weight): m.weight for m in model.modules() if isinstance(m, kinds)}.values():
        try:
            rebuilt, bits = quantise(weight.flatten(1).float())
        except (RuntimeError, AssertionError):
            rebuilt, bits = weight, 16.0
        rebuilt = rebuilt.view(weight.shape)
        error += float((rebuilt - weight).double().square().sum())
        energy += float(weight.double().square().sum())
        stored, weights = stored + bits * weight.numel(), weights + weight.numel()
        weight.copy_(rebuilt)
    return stored / weights, 10 * math.log10(error / energy)
