"""The names of dtypes in safetensors and torch, and parts as bytes and as tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from seedpack.errors import FormatError
from seedpack.formats import Part

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}  # fmt: skip
SPELLINGS = {
    "float64": "F64",
    "float32": "F32",
    "float": "F32",
    "fp32": "F32",
    "float16": "F16",
    "half": "F16",
    "fp16": "F16",
    "bfloat16": "BF16",
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
PACKABLE = frozenset({"F64", "F32", "F16", "BF16"})


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype.

    >>> dtype_name(torch.bfloat16)
    'BF16'
    """
    if dtype not in _NAMES:
        raise FormatError(f"a safetensors file cannot hold dtype {dtype}; convert the tensor first")
    return _NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors name, or of a common spelling such as float16 or bf16."""
    code = SPELLINGS.get(name.lower(), name.upper())
    if code not in TORCH_DTYPES:
        raise FormatError(f"unknown dtype {name!r}; known: {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[code]


def to_tensor(part: Part) -> Tensor:
    """Return a tensor over the part's bytes, without a copy."""
    if not len(part.data):
        return torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype])
    return torch.frombuffer(part.data, dtype=TORCH_DTYPES[part.dtype]).reshape(part.shape)


def to_bytes(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes | memoryview]:
    """Return (dtype name, shape, bytes) of a tensor, as the format writer takes it."""
    flat = tensor.detach().to("cpu").contiguous().flatten()
    data = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return dtype_name(tensor.dtype), tuple(tensor.shape), data


def find_shared(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return the names that view the same memory in the same way as an earlier name: {later: earlier}."""
    first: dict[tuple[object, ...], str] = {}
    shared = {}
    for name, tensor in tensors:
        if tensor.device.type == "meta" or not tensor.numel():
            continue
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if first.setdefault(view, name) != name:
            shared[name] = first[view]
    return shared
