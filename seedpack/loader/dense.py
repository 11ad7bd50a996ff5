"""Tensors out of a checkpoint: parts for a packed layer, or the dense weight."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from seedpack.codecs.base import Codec
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.registry import codec_from_spec
from seedpack.dtypes import TORCH_DTYPES, dtype_name, to_tensor
from seedpack.errors import CodecError, FormatError, SeedpackError, first_line
from seedpack.formats import Checkpoint, Manifest, View
from seedpack.keys import require_key
from seedpack.loader.layers import codec_matrix


def stored_parts(checkpoint: Checkpoint, name: str) -> tuple[Codec, dict[str, Tensor]]:
    """The codec and the parts of a tensor, as views of the file; digests and forms are checked."""
    entry = checkpoint.manifest.tensors[name]
    try:
        codec = codec_from_spec(checkpoint.manifest.codec_of(name))
        require_key(getattr(codec, "key", ""))
        parts = {part: to_tensor(stored) for part, stored in checkpoint.parts(name).items()}
        packed = not isinstance(codec, RawCodec)
        shape = codec_matrix(entry.shape, entry.transposed) if packed else entry.shape
        if checkpoint.fraction is None and parts.keys() != (expected := codec.parts(shape)).keys():
            raise CodecError(f"{codec.id}: expected parts {sorted(expected)}, found {sorted(parts)}")
        codec.check(parts, shape)
    except SeedpackError as error:
        if name in str(error):
            raise
        raise type(error)(f"{checkpoint.path}: tensor {name!r}: {error}") from None
    except MemoryError:
        raise _too_large(checkpoint, name, "no memory") from None
    except (TypeError, OverflowError) as error:
        id = checkpoint.manifest.codec_of(name).id
        raise CodecError(
            f"{checkpoint.path}: tensor {name!r}: settings of codec {id!r} are not usable: {error}"
        ) from None
    return codec, parts


def stored_dense(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """A tensor rebuilt in its own dtype, or in `dtype` if it is a float tensor; on a device, by its kernels."""
    entry = checkpoint.manifest.tensors[name]
    codec, parts = stored_parts(checkpoint, name)
    if isinstance(codec, RawCodec):
        tensor = parts["weight"]
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    matrix = codec_matrix(entry.shape, entry.transposed)
    if device is not None:
        parts = {part: value.to(device) for part, value in parts.items()}
    try:
        weight = codec.decode(parts, matrix, dtype or TORCH_DTYPES[entry.dtype])
    except (MemoryError, RuntimeError) as error:  # a few bytes can stand for a large weight
        raise _too_large(checkpoint, name, first_line(error)) from None
    return weight.mT.contiguous() if entry.transposed else weight.reshape(entry.shape)


def _too_large(checkpoint: Checkpoint, name: str, why: str) -> FormatError:
    size = math.prod(checkpoint.manifest.tensors[name].shape) * 4 / 1e9
    return FormatError(f"{checkpoint.path}: tensor {name!r} takes {size:.1f} GB rebuilt: {why}")


def dense_forms(checkpoint: Checkpoint, dtype: torch.dtype | None) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, safetensors dtype, shape) of what `dense_tensors` yields, in its order; nothing is decoded."""

    def form(name: str, stored: str, shape: tuple[int, ...]) -> tuple[str, str, tuple[int, ...]]:
        return name, dtype_name(dtype) if dtype and TORCH_DTYPES[stored].is_floating_point else stored, shape

    manifest = checkpoint.manifest
    forms = [
        form(name, manifest.tensors[stored].dtype, view.shape if view else manifest.tensors[stored].shape)
        for name, stored, view in stored_names(manifest)
    ]
    rest = [(key, checkpoint.undescribed(key)) for key in checkpoint.raw_keys()]
    return forms + [form(key, part.dtype, part.shape) for key, part in rest]


def dense_tensors(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, dense, one at a time; further names of shared ones follow with the same tensor."""
    done, tensor = "", torch.empty(0)
    for name, stored, view in stored_names(checkpoint.manifest):
        if stored != done:
            done, tensor = stored, stored_dense(checkpoint, stored, dtype if view is None else None)
        piece = tensor if view is None else viewed(tensor, view)
        yield name, piece.to(dtype) if dtype and piece.is_floating_point() else piece
    for key in checkpoint.raw_keys():
        tensor = to_tensor(checkpoint.undescribed(key))
        yield key, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def viewed(tensor: Tensor, view: View) -> Tensor:
    """The piece of a stored tensor that a view names."""
    piece = tensor.flatten()[view.offset : view.offset + math.prod(view.shape)].view(view.shape)
    return piece if view.scale == 1 else (piece.float() * view.scale).to(tensor.dtype)


def stored_names(manifest: Manifest) -> list[tuple[str, str, View | None]]:
    """(name, the name it is stored under, what piece of it) of every tensor of the model, one stored tensor after another."""
    others: dict[str, list[tuple[str, View | None]]] = {}
    for alias, name in manifest.shared.items():
        others.setdefault(name, []).append((alias, None))
    for alias, view in manifest.views.items():
        others.setdefault(view.tensor, []).append((alias, view))
    whole = manifest.tensors.keys() - {view.tensor for view in manifest.views.values()}
    return [
        (each, name, view)
        for name in manifest.tensors
        for each, view in ([(name, None)] if name in whole else []) + others.get(name, [])
    ]
