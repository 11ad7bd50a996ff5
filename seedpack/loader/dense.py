"""Read a checkpoint's tensors: as parts for a packed layer, or dense."""

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
    """Return the codec and the parts of a tensor, views of the file; digests, dtypes and shapes are checked."""
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
    """Rebuild a tensor in its own dtype, or if it is a float tensor in `dtype`; with a device, on that device."""
    entry = checkpoint.manifest.tensors[name]
    codec, parts = stored_parts(checkpoint, name)
    if isinstance(codec, RawCodec):
        return _cast(parts["weight"], dtype)
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


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def dense_forms(checkpoint: Checkpoint, dtype: torch.dtype | None) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (name, safetensors dtype, shape) of each tensor of `dense_tensors`, in its order; nothing is decoded."""
    tensors = checkpoint.manifest.tensors
    forms = [
        (name, tensors[stored].dtype, (view or tensors[stored]).shape)
        for name, stored, view in stored_names(checkpoint.manifest)
    ]
    undescribed = [(key, checkpoint.undescribed(key)) for key in checkpoint.raw_keys()]
    forms += [(key, part.dtype, part.shape) for key, part in undescribed]
    return [
        (name, dtype_name(dtype) if dtype and TORCH_DTYPES[stored].is_floating_point else stored, shape)
        for name, stored, shape in forms
    ]


def dense_tensors(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint, dense, one at a time; names that share a tensor follow each other."""
    last, tensor = "", torch.empty(0)
    for name, stored, view in stored_names(checkpoint.manifest):
        if stored != last:
            last, tensor = stored, stored_dense(checkpoint, stored, dtype if view is None else None)
        yield name, _cast(tensor if view is None else viewed(tensor, view), dtype)
    for key in checkpoint.raw_keys():
        yield key, _cast(to_tensor(checkpoint.undescribed(key)), dtype)


def viewed(tensor: Tensor, view: View) -> Tensor:
    """Return the piece of a stored tensor that a view names."""
    piece = tensor.flatten()[view.offset : view.offset + math.prod(view.shape)].view(view.shape)
    return piece if view.scale == 1 else (piece.float() * view.scale).to(tensor.dtype)


def stored_names(manifest: Manifest) -> list[tuple[str, str, View | None]]:
    """Return (name, stored tensor, view of it or None for all) of the model's tensors, grouped by stored tensor."""
    aliases: dict[str, list[tuple[str, View | None]]] = {name: [(name, None)] for name in manifest.tensors}
    for view in manifest.views.values():
        aliases[view.tensor] = []  # a tensor that views are made of is none of the model's own
    for alias, name in manifest.shared.items():
        aliases[name].append((alias, None))
    for alias, view in manifest.views.items():
        aliases[view.tensor].append((alias, view))
    return [(alias, name, view) for name, pairs in aliases.items() for alias, view in pairs]
