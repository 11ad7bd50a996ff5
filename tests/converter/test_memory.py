"""Memory is that of the largest tensor, however large a model is; measured in processes of their own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lib import large, watched
from seedpack.formats import Checkpoint
from tests.helpers.gguf_models import write_model

ALLOWED = 500_000_000  # bytes beside the largest tensor and what importing torch and transformers takes
READ_ALL = """
import sys
from seedpack.formats import Checkpoint
from seedpack.loader.dense import dense_tensors
with Checkpoint(sys.argv[1]) as checkpoint:
    print(sum(tensor.numel() for _, tensor in dense_tensors(checkpoint)))
"""


def beside(found: watched.Watched, tensor_bytes: int) -> int:
    """The private memory of a process beyond its imports and one tensor."""
    return found.private_bytes - watched.bare() - tensor_bytes


@pytest.mark.slow
def test_what_a_process_takes(tmp_path: Path) -> None:
    found = watched.watch([sys.executable, "-c", "x = b'x' * 300_000_000; print(len(x)); import time; time.sleep(0.3)"])
    assert 300e6 < found.private_bytes < found.peak_bytes < 350e6 and found.output == "300000000\n"
    with pytest.raises(RuntimeError, match="exit 3"):
        watched.watch([sys.executable, "-c", "raise SystemExit(3)"])
    folder = large.write_folder(tmp_path / "model", large.llama_config(256, 512, 1, 1000), 500_000)
    watched.watch(watched.seedpack("compress", folder, "-o", tmp_path / "packed", "--effort", "fast"))
    with Checkpoint(tmp_path / "packed") as packed:
        assert {name: tensor.shape for name, tensor in packed.manifest.tensors.items()} == large.shapes(
            large.llama_config(256, 512, 1, 1000)
        )


@pytest.mark.slow
def test_a_folder_of_20_gb(tmp_path: Path) -> None:
    """The largest tensor is fitted by trellis, and most of the others are stored as they are: fitting all would take an hour."""
    if shutil.disk_usage(tmp_path).free < 50e9:
        pytest.skip("takes 45 GB of disk")
    config = large.llama_config(8192, 28672, 12, 32000)
    largest = 2 * 32000 * 8192
    try:
        folder = large.write_folder(tmp_path / "model", config)
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert 20e9 < stored < 22e9 and len(list(folder.glob("*.safetensors"))) == 5
        chosen = ["--include", "model.embed_tokens.weight", "--include", "*layers.0.self_attn.[kv]_proj*"]
        options = [*chosen, "--effort", "fast", "--shard-size", "5GB"]
        packed = watched.watch(watched.seedpack("compress", folder, "-o", tmp_path / "packed", *options))
        shutil.rmtree(folder)
        verified = watched.watch(watched.seedpack("verify", tmp_path / "packed"))
        read = watched.watch([sys.executable, "-c", READ_ALL, tmp_path / "packed"])
        assert "all 111 tensors" in verified.output
        assert int(read.output) == sum(torch.Size(shape).numel() for shape in large.shapes(config).values())
    finally:
        shutil.rmtree(tmp_path)
    found = {"compress": beside(packed, largest), "verify": beside(verified, largest), "read": beside(read, largest)}
    print({name: f"{size / 1e6:.0f} MB" for name, size in found.items()}, f"{packed.seconds:.0f} s")
    assert all(size < ALLOWED for size in found.values()), found


@pytest.mark.slow
def test_a_gguf_file_of_many_times_its_largest_tensor(tmp_path: Path) -> None:
    """In float32 the model would take 2.1 GB, the largest tensor takes 34 MB."""
    changes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 8192, "head_dim": 128, "num_hidden_layers": 18,
               "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
    path = write_model(tmp_path / "model.gguf", "llama", ("Q4_K",), **changes)
    found = watched.watch(watched.seedpack("compress", path, "-o", tmp_path / "packed", "--codec", "raw"))
    print(f"{beside(found, 4 * 1024 * 8192) / 1e6:.0f} MB, {found.seconds:.0f} s")
    assert beside(found, 4 * 1024 * 8192) < ALLOWED
