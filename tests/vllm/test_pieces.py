"""The rows that each rank of vLLM holds make the whole weight; what is damaged, incomplete or of another shape is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import seedpack
from seedpack.errors import CodecError, DigestError, ModelError
from seedpack.formats import Checkpoint, Manifest
from seedpack.vllm.dense import dense_weights
from seedpack.vllm.pieces import Piece, register_parts, rows_of

SETTINGS: dict[str, dict[str, Any]] = {
    "trellis": {"effort": "fast"}, "seedlm": {}, "svd": {"rank": 4}, "basis": {"count": 40}, "mask": {"kept": 0.5},
}  # fmt: skip
CPU, SHAPE = torch.device("cpu"), (301, 40)  # a balance has 128 rows or more: not those of each rank alone
State = dict[str, Tensor]


def packed(path: Path, codec: str = "trellis", **tensors: Tensor) -> tuple[Manifest, State]:
    """Pack tensors, by default one weight, and return their manifest and what the file holds."""
    generator = torch.Generator().manual_seed(0)
    state = {f"{name}.weight": value for name, value in tensors.items()} or {
        "w.weight": torch.randn(SHAPE, generator=generator)
    }
    seedpack.compress({**state, "bias": torch.ones(3)}, path, codec=codec, settings=SETTINGS[codec])
    with Checkpoint(path) as checkpoint:
        return checkpoint.manifest.packed_only(), load_file(path)


def dense(path: Path) -> State:
    loaded: State = seedpack.load(path, dense=True)
    return loaded


def filled(manifest: Manifest, state: State, rows: Tensor) -> nn.Module:
    """Fill a piece by a layer's parameters, as vLLM does."""
    layer, piece = nn.Module(), Piece(manifest, "w.weight", SHAPE, rows, torch.float32)
    register_parts(layer, [piece], "", lambda part, value: piece.take(part, value, CPU))
    for name, parameter in layer.named_parameters():
        value = state[f"w.{name}"]
        assert parameter.dtype == value.dtype and not parameter.numel()
        parameter.weight_loader(parameter, value)  # type: ignore[attr-defined]
    module: nn.Module = rows_of([piece])[0]
    return module


@pytest.mark.parametrize("codec", SETTINGS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_make_the_whole(tmp_path: Path, codec: str, ranks: int) -> None:
    manifest, state = packed(tmp_path / "w.safetensors", codec)
    weight, x = dense(tmp_path / "w.safetensors")["w.weight"], torch.randn(5, SHAPE[1])
    products, looked_up = [], []
    for rows in torch.arange(SHAPE[0]).tensor_split(ranks):
        module: Any = filled(manifest, state, rows)
        products.append(module(x))
        looked_up.append(module.lookup(torch.arange(len(rows))))
    torch.testing.assert_close(torch.cat(products, -1), x @ weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(looked_up), weight, rtol=1e-6, atol=1e-6)


def test_rows_of_several_ranges(tmp_path: Path) -> None:
    """A fused tensor is cut inside each of its matrices."""
    manifest, state = packed(tmp_path / "w.safetensors")
    weight, x = dense(tmp_path / "w.safetensors")["w.weight"], torch.randn(2, SHAPE[1])
    rows = torch.cat([torch.arange(5, 10), torch.arange(40, 42)])
    torch.testing.assert_close(filled(manifest, state, rows)(x), x @ weight[rows].T, rtol=1e-4, atol=1e-4)


def test_a_raw_tensor_beside_packed_ones(tmp_path: Path) -> None:
    manifest, _ = packed(tmp_path / "w.safetensors")
    value = torch.randn(6, 4)
    piece = Piece(manifest, "raw.weight", (6, 4), torch.arange(2, 5), torch.bfloat16)
    piece.take("weight", value, CPU)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    torch.testing.assert_close(piece.filled()(x), x @ value[2:5].bfloat16().T)
    torch.testing.assert_close(piece.filled().lookup(torch.tensor([1])), value[3:4].bfloat16())
    with pytest.raises(ModelError, match=r"raw.weight: has shape \[6, 4\], and vLLM's layer takes \[6, 5\]"):
        Piece(manifest, "raw.weight", (6, 5), torch.arange(6), torch.float32).take("weight", value, CPU)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, state = packed(tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"w.weight: is packed as \[301, 40\], and vLLM's layer takes \[301, 41\]"):
        Piece(manifest, "w.weight", (301, 41), torch.arange(301), torch.float32)
    piece = Piece(manifest, "w.weight", SHAPE, torch.arange(301), torch.float32)
    piece.take("scales", state["w.scales"], CPU)
    with pytest.raises(ModelError, match="w.weight: the checkpoint lacks balance, exponent, weight; copy it again"):
        piece.filled()
    state["w.weight"][3, 0, 0] ^= 1
    with pytest.raises(
        DigestError, match="w.weight: part 'weight' is damaged: its digest differs; copy the file again"
    ):
        filled(manifest, state, torch.arange(9))
    monkeypatch.setenv("SEEDPACK_VERIFY", "0")
    filled(manifest, state, torch.arange(9))
    state["w.weight"] = state["w.weight"][:, :-1]
    with pytest.raises(CodecError, match="part 'weight' of a weight"):
        filled(manifest, state, torch.arange(9))


def test_rounding_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, state = packed(tmp_path / "w.safetensors")
    module: Any = filled(manifest, state, torch.arange(301))
    assert module.linear.int8_activations is False
    monkeypatch.setenv("SEEDPACK_INT8_ACTIVATIONS", "1")
    module = filled(manifest, state, torch.arange(301))
    assert module.linear.int8_activations is None


def test_what_stays_dense_is_decoded(tmp_path: Path) -> None:
    weights: Any = {"a": torch.randn(64, 32), "b": torch.randn(32, 64), "c": torch.randn(16, 8, 3, 3)}
    manifest, state = packed(tmp_path / "w.safetensors", **weights)
    exact = dense(tmp_path / "w.safetensors")
    chosen = manifest.select(["a.weight", "c.weight"])
    found = dict(dense_weights(iter(state.items()), chosen, torch.float32))
    assert found.keys() == {"a.weight", "c.weight", "bias"} | {key for key in state if key.startswith("b.")}
    assert all(torch.equal(found[name], exact[name]) for name in ("a.weight", "c.weight", "bias"))
    some = [(key, value) for key, value in state.items() if key != "a.scales"]
    with pytest.raises(ModelError, match="a.weight: the checkpoint lacks scales; copy it again"):
        list(dense_weights(some, chosen, torch.float32))
    state["a.weight"][0, 0, 0] ^= 4
    with pytest.raises(DigestError, match="a.weight: part 'weight' is damaged"):
        list(dense_weights(state.items(), chosen, torch.float32))
