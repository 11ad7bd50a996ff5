"""Read a checkpoint's tensors: as parts for a packed layer, or dense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from seedpack.codecs.base import Codec, Shape
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.registry import codec_from_spec
from seedpack.dtypes import TORCH_DTYPES, dtype_name, to_tensor
from seedpack.errors import BackendError, CodecError, FormatError, SeedpackError, first_line
from seedpack.formats import Checkpoint, Manifest, View
from seedpack.formats.header import nbytes
from seedpack.keys import require_key
from seedpack.loader.layers import codec_matrix
from seedpack.loader.limits import require_affordable, shown
from seedpack.units import count

IN_TURN = 32  # times the limit that all tensors may take, one after the other: those of any codec whose weights fit it

WEIGHTS_AT_ONCE = 1 << 22  # that are decoded


def stored_codec(checkpoint: Checkpoint, name: str) -> tuple[Codec, Shape]:
    """Return the codec of a tensor and the shape that it sees; settings and the parts' form are checked, no byte is read."""
    entry = checkpoint.manifest.tensors[name]
    with _naming(checkpoint, name):
        codec = codec_from_spec(checkpoint.manifest.codec_of(name))
        packed = not isinstance(codec, RawCodec)
        shape = codec_matrix(entry.shape, entry.transposed) if packed else entry.shape
        parts = _parts(checkpoint, name, digests=False)
        if checkpoint.fraction is None and parts.keys() != (expected := codec.parts(shape)).keys():
            raise CodecError(f"{codec.id}: expected parts {sorted(expected)}, found {sorted(parts)}")
        codec.check_form(parts, shape)
    return codec, shape


def stored_parts(checkpoint: Checkpoint, name: str) -> tuple[Codec, dict[str, Tensor]]:
    """Return the codec and the parts of a tensor, views of the file; they are checked in full.

    Raises:
        LimitError: to check them takes too much.
    """
    codec, shape = stored_codec(checkpoint, name)
    return codec, _usable_parts(checkpoint, name, codec, shape)


def _usable_parts(checkpoint: Checkpoint, name: str, codec: Codec, shape: Shape) -> dict[str, Tensor]:
    with _naming(checkpoint, name):
        require_key(codec.key_check)
        require_affordable(checkpoint, f"tensor {name!r}", codec.checking_cost(shape))
    return checked_parts(checkpoint, name, codec, shape)


def checked_parts(
    checkpoint: Checkpoint, name: str, codec: Codec, shape: Shape, *, digests: bool = True
) -> dict[str, Tensor]:
    """Return the parts of `stored_codec`'s codec and shape; digests are checked, unless they have been, and elements."""
    with _naming(checkpoint, name):
        parts = _parts(checkpoint, name, digests=digests)
        codec.check(parts, shape)
    return parts


def _parts(checkpoint: Checkpoint, name: str, *, digests: bool) -> dict[str, Tensor]:
    return {part: to_tensor(stored) for part, stored in checkpoint.parts(name, check=digests).items()}


@contextmanager
def _naming(checkpoint: Checkpoint, name: str) -> Iterator[None]:
    """Name file and tensor in errors; what settings and shapes of a file make of arithmetic is an error of the file."""
    try:
        yield
    except BackendError:
        raise  # says nothing of the file
    except SeedpackError as error:
        if f"tensor {name!r}" in str(error):
            raise
        raise type(error)(f"{checkpoint.path}: tensor {name!r}: {error}") from None
    except MemoryError:
        raise _too_large(checkpoint, name, "no memory") from None
    except (TypeError, ArithmeticError) as error:
        id = checkpoint.manifest.codec_of(name).id
        raise CodecError(
            f"{checkpoint.path}: tensor {name!r}: settings of codec {id!r} are not usable: {error}"
        ) from None


def require_decodable(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, int]:
    """Refuse tensors of which one takes too much decoded, or all one after the other, before any is; return what each takes.

    Raises:
        LimitError: naming the tensor.
    """
    costs = {name: _affordable_cost(checkpoint, name, *stored_codec(checkpoint, name)) for name in names}
    work = sum(costs.values()) // IN_TURN
    require_affordable(checkpoint, f"{count(len(costs), 'tensor')}, one after the other,", work, in_memory=False)
    return costs


def _affordable_cost(checkpoint: Checkpoint, name: str, codec: Codec, shape: Shape) -> int:
    """Return the bytes that rebuilding a tensor takes (`Codec.decoding_cost`), unless they are too many."""
    entry = checkpoint.manifest.tensors[name]
    with _naming(checkpoint, name):
        cost = codec.decoding_cost(shape) + (nbytes(entry.dtype, entry.shape) if entry.transposed else 0)
    require_affordable(checkpoint, f"tensor {name!r}", cost)
    return cost


def stored_dense(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """Rebuild a tensor in its own dtype, or if it is a float tensor in `dtype`; with a device, on that device.

    A raw tensor may be a view of the file.

    Raises:
        LimitError: it takes too much.
    """
    entry = checkpoint.manifest.tensors[name]
    codec, matrix = stored_codec(checkpoint, name)
    _affordable_cost(checkpoint, name, codec, matrix)
    parts = _usable_parts(checkpoint, name, codec, matrix)
    if isinstance(codec, RawCodec):
        return _cast(parts["weight"], dtype)
    if device is not None:
        parts = {part: value.to(device) for part, value in parts.items()}
    try:
        weight = _decoded(codec, parts, matrix, dtype or TORCH_DTYPES[entry.dtype])
    except SeedpackError:
        raise
    except (MemoryError, RuntimeError) as error:  # a few bytes can stand for a large weight
        raise _too_large(checkpoint, name, first_line(error)) from None
    return weight.mT.contiguous() if entry.transposed else weight.reshape(entry.shape)


def _decoded(codec: Codec, parts: dict[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
    """Return a weight; of many rows that are decoded each for itself, some rows at a time."""
    if not codec.row_by_row or math.prod(shape) <= WEIGHTS_AT_ONCE:
        return codec.decode(parts, shape, dtype)
    weight = torch.empty(shape, dtype=dtype, device=parts["weight"].device)
    for index in torch.arange(shape[0], device=weight.device).split(max(1, WEIGHTS_AT_ONCE // math.prod(shape[1:]))):
        weight[int(index[0]) : int(index[-1]) + 1] = codec.decode_rows(parts, index, shape, dtype)
    return weight


def _too_large(checkpoint: Checkpoint, name: str, why: str) -> FormatError:
    size = math.prod(checkpoint.manifest.tensors[name].shape) * 4
    return FormatError(f"{checkpoint.path}: tensor {name!r} takes {shown(size)} rebuilt: {why}")


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
    """Yield every tensor of a checkpoint, dense, one at a time; names of one tensor follow each other and get the same one."""
    last: tuple[str, View | None] = "", None
    rebuilt = tensor = torch.empty(0, dtype=torch.float32)
    for name, stored, view in stored_names(checkpoint.manifest):
        if stored != last[0]:
            rebuilt = stored_dense(checkpoint, stored, dtype if view is None else None)
        if (stored, view) != last:
            last, tensor = (stored, view), _cast(rebuilt if view is None else viewed(rebuilt, view), dtype)
        yield name, tensor
    for key in checkpoint.raw_keys():
        yield key, _cast(to_tensor(checkpoint.undescribed(key)), dtype)


def dense_state(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint, dense; names of one tensor share its storage, and none is a view of the file.

    Raises:
        LimitError: they take too much together.
    """
    _require_room(checkpoint, dtype)
    state: dict[str, Tensor] = {}
    last = own = torch.empty(0, dtype=torch.float32)
    for name, tensor in dense_tensors(checkpoint, dtype):
        if tensor is not last:
            last, own = tensor, tensor if _owns_memory(tensor) else tensor.clone()
        state[name] = own
    return state


def _owns_memory(tensor: Tensor) -> bool:
    """Return whether a tensor is all of a storage that torch allocated: no piece of one, and no view of a file."""
    storage = tensor.untyped_storage()
    return storage.resizable() and storage.nbytes() == tensor.nbytes


def _require_room(checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """Refuse tensors that take too much together: those that are there, and the one that is being decoded."""
    costs = require_decodable(checkpoint, checkpoint.manifest.tensors)
    sizes = [nbytes(kind, shape) for _, kind, shape in dense_forms(checkpoint, dtype)]
    names = stored_names(checkpoint.manifest)
    kept = peak = 0
    last: tuple[str, View | None] = "", None
    for (_, stored, view), size in zip(names, sizes, strict=False):
        if (stored, view) != last:
            last = stored, view
            peak = max(peak, kept + max(costs[stored], size))
            kept += size
    peak = max(peak, kept + sum(sizes[len(names) :]))
    largest = max(costs, key=costs.__getitem__, default="")
    require_affordable(checkpoint, f"tensor {largest!r} together with all others", peak)


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
