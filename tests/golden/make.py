"""Write golden files for codec versions that have none: `python -m tests.golden.make`. Existing ones are never touched.

A case is a folder `<codec>.v<version>/<name>/` with `packed.safetensors`, `decoded.safetensors` and `SHA256SUMS`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import seedpack
from seedpack.codecs.base import Codec
from seedpack.codecs.basis import BasisCodec
from seedpack.codecs.mask import MaskCodec
from seedpack.codecs.raw import RawCodec
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.stack import StackCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.codecs.trellis import TrellisCodec
from seedpack.prng import philox_words

HERE = Path(__file__).resolve().parent
CASES: dict[str, Codec] = {
    "default": SeedLMCodec(),
    "three-bits": SeedLMCodec.from_bits(3.0),
    "paper-rule": SeedLMCodec(exponents=1),
    "odd-fields": SeedLMCodec(seed_bits=13, block=7, rank=4),
    "wide-seeds": SeedLMCodec(seed_bits=18, block=6, rank=2, exponents=1),
    "fp16-factors": SVDCodec(rank=3),
    "ranks-in-levels": SVDCodec(rank=6, levels=3),
    "seedlm-factors": SVDCodec.over(SeedLMCodec(seed_bits=10), rank=5),
    "four-bits": TrellisCodec(4, effort="fast"),
    "two-bits": TrellisCodec(2, seed=7, weights_per_window=1),
    "odd-windows": TrellisCodec(3, 13, seed=2**40, effort="fast", weights_per_window=1),
    "long-windows": TrellisCodec(5, 18, effort="fast"),
    "ending-in-zeros": TrellisCodec(2, circular=False, weights_per_window=1),
    "pairs-of-two-bits": TrellisCodec(2, seed=7, weights_per_window=2),
    "pairs-of-three-bits": TrellisCodec(3, 13, seed=2**40, effort="fast", weights_per_window=2),
    "pairs-in-long-windows": TrellisCodec(1, 20, effort="fast", weights_per_window=2),
    "pairs-ending-in-zeros": TrellisCodec(2, circular=False, weights_per_window=2),
    "a-multiplier": TrellisCodec(4, seed=7),
    "an-odd-multiplier": TrellisCodec(3, 13, seed=2**40, effort="fast", multiplier=0x12345679),
    "half-bits": TrellisCodec(2.5, effort="fast"),
    "half-bits-in-long-windows": TrellisCodec(1.5, 20, seed=2**40, effort="fast"),
    "half-bits-ending-in-zeros": TrellisCodec(3.5, seed=7, effort="fast", circular=False),
    "structured-bases": BasisCodec(count=70, coef_bits=5, seed=11, levels=3),
    "noise": BasisCodec("philox", count=9, blocks=3, coef_bits=16, seed=2**40),
    "squirrels": BasisCodec("squirrel5", count=6, seed=7),
    "three-in-ten": MaskCodec(0.3, seed=2**40),
    "ten-rows-each": StackCodec.over(SeedLMCodec(10, 8, 3), 10, 37),
    "transposed": StackCodec.over(TrellisCodec(3, effort="fast", weights_per_window=1), 4, 37, transposed=True),
    "plain": RawCodec("BF16"),
}
# Cases whose encoder has searched otherwise since: their decoding is pinned, and no more.
ENCODED_OTHERWISE = ("two-bits", "ending-in-zeros")


def folder(name: str) -> Path:
    codec = CASES[name]
    return HERE / f"{codec.id}.v{codec.spec().version}" / name


def source() -> dict[str, Tensor]:
    """Fixed weights, from Philox alone: sums of four uniform words, nearly Gaussian, exact on every machine."""
    words = philox_words(20261120, 4 * 20 * 37).view(4, 20, 37)
    weight = ((words >> 8).to(torch.float32) / 2**24 - 0.5).sum(0)
    return {"layer.weight": weight, "layer.bias": weight[:, 0].clone(), "steps": torch.tensor(7), "tied.weight": weight}


def write(path: Path, codec: Codec) -> None:
    path.mkdir(parents=True)
    options = (
        {"codec": codec}
        if not isinstance(codec, RawCodec)
        else {"codec": SeedLMCodec(), "exclude": ["*"], "dtype": "BF16"}
    )
    tensors = source()
    tensors["tied.weight"] = tensors["layer.weight"]
    seedpack.compress(tensors, path / "packed.safetensors", **options)
    decoded = {name: tensor.clone() for name, tensor in seedpack.load(path / "packed.safetensors", dense=True).items()}
    save_file(decoded, path / "decoded.safetensors")
    sums = [
        f"{hashlib.sha256((path / n).read_bytes()).hexdigest()}  {n}"
        for n in ("decoded.safetensors", "packed.safetensors")
    ]
    (path / "SHA256SUMS").write_text("\n".join(sums) + "\n")


def main() -> None:
    missing = [name for name in CASES if not folder(name).exists()]
    if not missing:
        print("every case has its files; a new layout needs a new version of its codec")
        return
    status = ["git", "status", "--porcelain", "--untracked-files=no"]
    dirty = subprocess.run(status, cwd=HERE, capture_output=True, text=True, check=True).stdout
    if dirty:
        sys.exit(f"commit first: golden files are made from a clean tree\n{dirty}")
    for name in missing:
        write(folder(name), CASES[name])
        print("written:", folder(name).relative_to(HERE))


if __name__ == "__main__":
    main()
