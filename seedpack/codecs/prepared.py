"""Products of few tokens that are prepared once for a weight and then called again and again, kept with its first part.

A codec's `prepare` makes one where this machine has a faster product for activations of 8 bits. It is known by where the parts
are; their content is compared by the product itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seedpack.codecs.base import Codec, Shape
from seedpack.kernels.common.row_tiles import FEW_TOKENS, Product

_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _Entry:
    codec: Codec
    places: list[int]  # where the parts are, and the planes less where the bias is
    product: Product | None
    owner: weakref.ref[Tensor]  # forgets the entry when the part is gone


_entries: dict[int, _Entry] = {}  # by id of the first part; that an id is taken anew does no harm, as the places decide


def few_tokens(
    codec: Codec,
    x: Tensor,
    parts: Sequence[Tensor],
    names: Sequence[str],
    shape: Shape,
    bias: Tensor | None,
    planes: int,
) -> Tensor | None:
    """Return the product of few tokens x [..., in], plus bias [out], in the dtype of x, rounded to 8 bits, or in two planes to 16.

    None where this machine, or the codec, has none: then `Codec.matmul` serves.
    """
    elements = x.numel()
    if not 0 < elements <= FEW_TOKENS * shape[1] or not x.is_cpu:
        return None
    places = [part.data_ptr() for part in parts]
    places.append(planes if bias is None else planes - bias.data_ptr())
    key = id(parts[0])
    for _ in range(2):
        entry = _entries.get(key)
        if entry is None or entry.places != places or (entry.codec is not codec and entry.codec != codec):
            product = codec.prepare(dict(zip(names, parts, strict=True)), shape, bias, planes)
            owner = weakref.ref(parts[0], lambda _: _entries.pop(key, None))
            entry = _entries[key] = _Entry(codec, places, product, owner)
        if (product := entry.product) is None or elements > product.most_tokens * shape[1]:
            return None
        given = x if x.dtype in _DTYPES else x.to(torch.float32)
        if (y := product(given if given.is_contiguous() else given.contiguous())) is not None:
            return y if given is x else y.to(x.dtype)
        _entries.pop(key, None)  # the parts have other bytes now
    return None
