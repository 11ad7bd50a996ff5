"""Packed tensors for which a model of vLLM has no layer that stays packed: they are made dense while they are loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from seedpack.codecs.registry import codec_from_spec
from seedpack.errors import ModelError
from seedpack.formats import Manifest
from seedpack.loader.layers import codec_matrix
from seedpack.vllm.pieces import require_digest


def dense_weights(
    weights: Iterable[tuple[str, Tensor]], manifest: Manifest, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors, those of a manifest decoded in their dense shape, all others as they come.

    Args:
        weights: names and tensors; each packed tensor comes in parts.
        manifest: of the tensors to decode.
        dtype: that they are decoded in.

    Raises:
        ModelError: of one of them a part is missing.
    """
    owners = {key: (name, part) for name in manifest.tensors for part, key in manifest.part_keys(name).items()}
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in weights:
        if key not in owners:
            yield key, value
            continue
        name, part = owners[key]
        entry = manifest.tensors[name]
        require_digest(name, part, value, entry.parts)
        parts[name][part] = value
        if parts[name].keys() == entry.parts.keys():
            codec, matrix = codec_from_spec(manifest.codec_of(name)), codec_matrix(entry.shape, entry.transposed)
            found = parts.pop(name)
            codec.check(found, matrix)
            weight = codec.decode(found, matrix, dtype)
            yield name, (weight.mT if entry.transposed else weight).reshape(entry.shape)
    for name, found in parts.items():
        raise ModelError(
            f"{name}: the checkpoint lacks {', '.join(sorted(manifest.tensors[name].parts.keys() - found))}; copy it again"
        )
