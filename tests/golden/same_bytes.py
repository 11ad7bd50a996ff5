"""Record what `compress` writes for small models of every kind: `python -m tests.golden.same_bytes`.

A case is a name and a function that writes an output. Of each, `same_bytes.json` holds the SHA-256 of the weights' files
(less the version of seedpack in their headers) and of the packed manifest, and the relative error in dB. Weights come from
Philox, so they are the same on every machine. What is fitted with sums of floats (a Hessian, an SVD, conjugate gradients,
training) may differ on another processor or another torch in its last bits: there `test_same_bytes.py` compares the error.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import seedpack
from seedpack import Calibration, image
from seedpack.prng import philox_words
from seedpack.reparam import basis_, mask_
from tests.helpers.gguf import write_gguf
from tests.helpers.models import ARCHITECTURES

HERE = Path(__file__).resolve().parent
SUMS = HERE / "same_bytes.json"
PORTABLE = ("trellis", "seedlm", "raw", "plan")  # beginnings of the names of cases that are exact on every machine
TEXT = Calibration("self", tokens=256, context=32, sequential=False)


def gaussian(seed: int, *shape: int) -> Tensor:
    """Nearly Gaussian weights of deviation 1: sums of twelve uniform words, exact on every machine."""
    count = int(np.prod(shape))
    words = philox_words(seed, 12 * count).view(12, count)
    return ((words >> 8).to(torch.float64) / 2**24 - 0.5).sum(0).float().view(shape)


def draw(model: Any) -> Any:
    """A model whose matrices are drawn anew from Philox."""
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            if parameter.dim() > 1:
                parameter.copy_(gaussian(seed, *parameter.shape) * parameter.shape[-1] ** -0.5)
    return model


def state() -> dict[str, Tensor]:
    """Every kind of tensor that a state dict has."""
    matrix = gaussian(1, 160, 96) * torch.linspace(0.2, 2, 96)
    return {
        "embed.weight": gaussian(2, 40, 24), "fc.weight": matrix, "fc.bias": gaussian(3, 160), "tied.weight": matrix,
        "odd.weight": gaussian(4, 33, 37), "conv.weight": gaussian(5, 12, 5, 3, 3), "half.weight": gaussian(6, 24, 40).half(),
        "steps": torch.tensor(7),
    }  # fmt: skip


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(torch.relu(self.conv(x)).mean((2, 3))))


def of_state(**options: Any) -> Callable[[Path], Any]:
    return lambda out: seedpack.compress(state(), out / "out.safetensors", **options)


def of_folder(model: str, shards: str = "5GB", **options: Any) -> Callable[[Path], Any]:
    def write(out: Path) -> Any:
        draw(ARCHITECTURES[model]()).save_pretrained(out / "dense", max_shard_size=shards)
        return seedpack.compress(out / "dense", out / "out", **options)

    return write


def of_file(out: Path) -> Any:
    torch.save({"state_dict": state(), "epoch": 3}, out / "model.pt")
    return seedpack.compress(out / "model.pt", out / "out.safetensors", bits=3.0)


def of_gguf(out: Path) -> Any:
    return seedpack.compress(write_gguf(out / "tiny.gguf"), out / "out")


def of_module(out: Path) -> Any:
    batches = [gaussian(9, 4, 1, 12, 12), gaussian(10, 4, 1, 12, 12)]
    return seedpack.compress(draw(Small()), out / "out.safetensors", calibration=batches)


def of_image(out: Path) -> Any:
    pixels = (gaussian(11, 24, 3, 1).cumsum(0) * 9 + gaussian(12, 1, 3, 32).cumsum(2) * 9 + 128).clamp(0, 255)
    Image.fromarray(pixels.permute(0, 2, 1).to(torch.uint8).numpy()).save(out / "in.png")
    image.compress(out / "in.png", out / "out.safetensors", psnr=25, steps=30)


def of_training(reparametrise: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def write(out: Path) -> Any:
        torch.manual_seed(0)
        seedpack.save(reparametrise(draw(Small())), out / "out.safetensors")

    return write


def unpacked(out: Path) -> Any:
    report = of_folder("gpt2", codec="seedlm", bits=3.0)(out)
    from seedpack.api import unpack

    (out / "out").rename(out / "packed")
    unpack(out / "packed", out / "out", dtype="bfloat16")
    return report


def hessian(size: int) -> Tensor:
    x = gaussian(20, 3 * size, size) * torch.linspace(0.3, 3, size)
    return x.T @ x / len(x)


CASES: dict[str, Callable[[Path], Any]] = {
    "trellis-default": of_state(), "trellis-1-bit": of_state(bits=1.0), "trellis-fast": of_state(settings={"effort": "fast", "seed": 5}),
    "trellis-best": of_state(bits=2.0, settings={"effort": "best"}, include=["odd.weight", "conv.weight"]),
    "trellis-plain": of_state(bits=3.0, settings={"balance": False, "state_bits": 13, "circular": False}),
    "trellis-importance": of_state(importance={"fc.weight": torch.linspace(0.5, 2, 96)}),
    "trellis-file": of_file, "trellis-bfloat16": of_state(dtype="bfloat16", exclude=["odd.*"]),
    "seedlm-default": of_state(codec="seedlm"), "seedlm-3-bits": of_state(codec="seedlm", bits=3.0, settings={"exponents": 1}),
    "raw-state": of_state(codec="raw"),
    "plan-budget": of_state(bits=3.4), "plan-size": of_state(target_size=14000),
    "plan-by-hand": of_state(plan={"seedpack_plan": 1, "tensors": {"odd.weight": {"codec": "raw", "config": {"dtype": "F32"}}}}),
    "hessian-trellis": of_state(importance={"fc.weight": hessian(96), "odd.weight": hessian(37)}),
    "hessian-seedlm": of_state(codec="seedlm", importance={"fc.weight": hessian(96), "odd.weight": hessian(37)}),
    "hessian-svd": of_state(codec="svd+trellis", importance={"fc.weight": hessian(96), "odd.weight": hessian(37)}),
    "svd-bits": of_state(codec="svd"), "svd-rank": of_state(codec="svd", settings={"rank": 5, "levels": 2}),
    "svd-seedlm": of_state(codec="svd+seedlm"), "svd-trellis": of_state(codec="svd+trellis"),
    "basis-hadamard": of_state(codec="basis", bits=1.0, settings={"coef_bits": 8}),
    "basis-philox": of_state(codec="basis", settings={"generator": "philox", "count": 6}),
    "mask-default": of_state(codec="mask"),
    "field-image": of_image, "training-basis": of_training(lambda net: basis_(net, 40, coef_bits=8)), "training-mask": of_training(mask_),
    "folder-plain": of_folder("llama"), "folder-tied": of_folder("llama-tied"), "folder-transposed": of_folder("gpt2"),
    "folder-encoder": of_folder("bert"), "folder-t5": of_folder("t5"), "folder-gemma": of_folder("gemma3"),
    "folder-head-bits": of_folder("llama-tied", bits=2.0, head_bits=6), "folder-budget": of_folder("llama", bits=3.4),
    "folder-size": of_folder("llama-tied", target_size=16500),
    "folder-shards": of_folder("llama", shards="20KB", shard_bytes=12000),
    "folder-experts": of_folder("mixtral"), "folder-experts-budget": of_folder("qwen3-moe", bits=2.6),
    "folder-unpacked": unpacked, "folder-gguf": of_gguf,
    "calibrated-module": of_module, "calibrated-self": of_folder("llama-tied", calibration=TEXT),
    "calibrated-seedlm": of_folder("llama", codec="seedlm", calibration=TEXT),
    "calibrated-experts": of_folder("mixtral", calibration=TEXT),
    "calibrated-budget": of_folder("llama", bits=3.4, calibration=TEXT),
    "calibrated-size": of_folder("llama-tied", target_size=16500, calibration=TEXT),
    "calibrated-sequential": of_folder("llama", calibration=Calibration("self", 256, 32, sequential=True)),
    "calibrated-tuned": of_folder("llama-tied", calibration=replace(TEXT, tune=1)),
    "calibrated-everything": of_folder("qwen3", bits=2.7, calibration=Calibration("self", 256, 32, sequential=True, tune=1)),
}  # fmt: skip


def run(name: str) -> dict[str, Any]:
    """Run a case; return {"files": SHA-256 of each that it writes, "error_db"}."""
    everywhere = mock.patch("seedpack.converter.calibration.moments.bfloat16_is_faster", return_value=False)
    with tempfile.TemporaryDirectory() as place, everywhere:  # a model writes the same text
        torch.manual_seed(0)
        report = CASES[name](Path(place))
        target = Path(place) / "out.safetensors"
        found = {"files": sums(target if target.exists() else Path(place) / "out")}
        if hasattr(report, "error_db"):
            found["error_db"] = round(report.error_db, 3)
        return found


def sums(output: Path) -> dict[str, str]:
    """SHA-256 of the weights' files, and of the manifest in a config.json."""
    writer = f"seedpack {seedpack.__version__}".encode()

    def digest(data: bytes) -> str:
        return hashlib.sha256(data[8:].replace(writer, b"seedpack")).hexdigest()

    if output.is_file():
        return {"file": digest(output.read_bytes())}
    found = {file.name: digest(file.read_bytes()) for file in sorted(output.glob("*.safetensors"))}
    config = json.loads((output / "config.json").read_text())
    manifest = json.dumps(config.get("quantization_config"), sort_keys=True)
    return found | {"config.json": digest(bytes(8) + manifest.encode())}


def machine() -> str:
    """Name the machine, on which the last bits of sums of floats depend."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {processor}, {torch.get_num_threads()} threads"


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    known = json.loads(SUMS.read_text()) if SUMS.exists() else {"cases": {}}
    for name in names:
        found = run(name)
        print(name, found.get("error_db", ""), "" if known["cases"].get(name) == found else "(new)", flush=True)
        known["cases"][name] = found
    known["machine"] = machine()
    known["cases"] = {name: known["cases"][name] for name in CASES}
    SUMS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
