"""The kernels of the basis codec: weights that are pseudorandom bases times coefficients."""

from __future__ import annotations

from seedpack.errors import CodecError
from seedpack.kernels.basis.dense_noise import DenseNoise
from seedpack.kernels.basis.noise_basis import HADAMARD as HADAMARD
from seedpack.kernels.basis.noise_basis import NoiseBasis as NoiseBasis
from seedpack.kernels.basis.structured import StructuredBasis

KINDS: dict[str, type[NoiseBasis]] = {"philox": DenseNoise, "squirrel5": DenseNoise, HADAMARD: StructuredBasis}
GENERATORS = tuple(KINDS)


def noise_basis(generator: str, seed: int, key: str = "") -> NoiseBasis:
    """Return the bases of a generator.

    Raises:
        CodecError: the generator is unknown, or takes no private key.
    """
    if generator not in GENERATORS:
        raise CodecError(f"basis: generator must be one of {', '.join(GENERATORS)}, got {generator!r}")
    return KINDS[generator](generator, seed, key)
