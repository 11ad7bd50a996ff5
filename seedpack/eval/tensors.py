"""Compare two checkpoints tensor by tensor: relative error and effective rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from seedpack.codecs.base import matrix_shape
from seedpack.codecs.registry import codec_from_spec
from seedpack.codecs.svd import SVDCodec
from seedpack.converter.sources.open import TORCH_SUFFIXES, open_source
from seedpack.dtypes import to_tensor
from seedpack.errors import FormatError, ModelError, NotPackedError
from seedpack.formats import Checkpoint
from seedpack.linalg import captured_energy, effective_rank, singular_values
from seedpack.loader.dense import stored_dense
from seedpack.loader.layers import codec_matrix

SPREAD = 32  # singular values of a spectrum


@dataclass(frozen=True)
class TensorComparison:
    """A tensor of model B compared with that of model A.

    Attributes:
        error: ‖A - B‖².
        energy: ‖A‖².
        rank_a, rank_b: effective ranks; None for tensors that are not matrices, or if not asked for.
        rank: of the factors in B, if an SVD codec stored it.
        captured: energy captured by them, 1 - error / energy.
        optimal: the same of the best approximation of that rank.
        spectrum: 32 of the singular values of A, evenly spread from the largest to the smallest, as shares of the largest.
    """

    name: str
    shape: tuple[int, ...]
    error: float
    energy: float
    rank_a: float | None = None
    rank_b: float | None = None
    rank: int | None = None
    captured: float | None = None
    optimal: float | None = None
    spectrum: tuple[float, ...] | None = None


@dataclass(frozen=True)
class _Model:
    """A model's tensors: shapes by name, how to read one, and the ranks of those stored by an SVD codec."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    ranks: dict[str, int]


def compare_tensors(
    a: str | Path, b: str | Path, *, ranks: bool = True, max_bytes: int | None = None, state_key: str | None = None
) -> tuple[list[str], int, Iterator[TensorComparison]]:
    """Compare the float tensors that two models share.

    Args:
        a: a dense or packed model, the reference.
        b: another one.
        ranks: also compute effective ranks (one eigendecomposition per tensor and model).
        max_bytes: that decoding a tensor may take, as `seedpack.load` takes it.
        state_key: of files that torch saved, the key of the state dict.

    Returns:
        The names that only one model has, the number of common ones, and their comparisons, one at a time.
    """
    left, right = _open(a, max_bytes, state_key), _open(b, max_bytes, state_key)
    common = [name for name in left.shapes if name in right.shapes]
    if not common:
        raise ModelError(f"{a} and {b} have no tensor name in common; the first has {next(iter(left.shapes))!r}")
    for name in common:
        if left.shapes[name] != right.shapes[name]:
            raise ModelError(
                f"tensor {name!r}: {a} has shape {list(left.shapes[name])}, {b} has {list(right.shapes[name])}"
            )
    lone = sorted(left.shapes.keys() ^ right.shapes.keys())
    return lone, len(common), _compare(left, right, common, ranks)


def _compare(left: _Model, right: _Model, names: list[str], ranks: bool) -> Iterator[TensorComparison]:
    for name in names:
        x, y = left.read(name), right.read(name)
        if not x.is_floating_point():
            continue
        x, y = x.float(), y.float()
        error, energy = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in (x - y, x))
        finite = bool(torch.isfinite(x).all() and torch.isfinite(y).all())
        if x.dim() < 2 or not ranks or 0 in x.shape or not finite or energy == 0:
            yield TensorComparison(name, tuple(x.shape), error, energy)
            continue
        matrix = matrix_shape(tuple(x.shape))
        values = singular_values(x.reshape(matrix))
        rank = right.ranks.get(name)
        yield TensorComparison(
            name,
            tuple(x.shape),
            error,
            energy,
            effective_rank(values),
            effective_rank(singular_values(y.reshape(matrix))),
            rank,
            None if rank is None else 1 - error / energy,
            None if rank is None else captured_energy(values, rank),
            tuple(
                (
                    values[torch.linspace(0, len(values) - 1, SPREAD, dtype=torch.float64).round().long()] / values[0]
                ).tolist()
            ),
        )


def _open(path: str | Path, max_bytes: int | None, state_key: str | None) -> _Model:
    try:
        checkpoint = Checkpoint(path, max_bytes=max_bytes)
    except FormatError as error:
        if not isinstance(error, NotPackedError) and _claims_to_be_packed(Path(path)):
            raise
        source = open_source(path, state_key=state_key if Path(path).suffix in TORCH_SUFFIXES else None)
        return _Model({name: t.shape for name, t in source.tensors.items()}, source.read, {})
    checkpoint.close()  # its mapping lives on
    manifest = checkpoint.manifest
    ranks = {}
    for name, entry in manifest.tensors.items():
        if manifest.codec_of(name).id == SVDCodec.id:
            codec = codec_from_spec(manifest.codec_of(name))
            assert isinstance(codec, SVDCodec)
            ranks[name] = codec.rank_of(codec_matrix(entry.shape, entry.transposed))
    undescribed = {key: checkpoint.undescribed(key) for key in checkpoint.raw_keys()}
    shapes = {name: entry.shape for name, entry in manifest.tensors.items()}
    shapes |= {key: part.shape for key, part in undescribed.items()}

    def read(name: str) -> Tensor:
        return to_tensor(undescribed[name]) if name in undescribed else stored_dense(checkpoint, name)

    return _Model(shapes, read, ranks)


def _claims_to_be_packed(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    config = path / "config.json"
    return config.is_file() and '"seedpack"' in config.read_text("utf-8", "replace")
