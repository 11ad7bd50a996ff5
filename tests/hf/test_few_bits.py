"""Folders whose weights are in 8 or 4 bits are packed as their dense weights are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

import seedpack
from seedpack.cli.main import cli
from seedpack.converter.options import Calibration
from seedpack.converter.sources.open import open_source
from seedpack.errors import ModelError
from seedpack.hf.quantization import block_sizes, dense_dtype, quantizations, without_quantization
from tests.helpers.few_bits import State, float8_blocks, rewritten, spread_blocks
from tests.helpers.models import CODEC, ROUTED, SMALL, llama, output

BLOCK = 16
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
Quantise = Callable[[str, Tensor], tuple[State, Tensor]]  # a weight's stored tensors, and the dense one they stand for


def deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        **SMALL, num_key_value_heads=4, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, n_shared_experts=1, moe_intermediate_size=24, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config).bfloat16()


def in_blocks(name: str, weight: Tensor) -> tuple[State, Tensor]:
    stored, scale = float8_blocks(weight, BLOCK)
    dense = (stored.float() * spread_blocks(scale, weight.shape, BLOCK)).to(weight.dtype)
    return {name: stored, f"{name}_scale_inv": scale}, dense


def per_row(name: str, weight: Tensor) -> tuple[State, Tensor]:
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    stored = (weight / scale).to(torch.float8_e4m3fn)
    dense = (stored.float() * scale.float()).to(weight.dtype)
    return {name: stored, f"{name}_scale": scale}, dense


def per_tensor(name: str, weight: Tensor) -> tuple[State, Tensor]:
    scale = weight.float().abs().max() / 57344
    stored = (weight / scale).to(torch.float8_e5m2)
    module = name.removesuffix(".weight")
    state = {name: stored, f"{name}_scale": scale, f"{module}.input_scale": torch.tensor(2.0)}
    return state, (stored.float() * scale).to(weight.dtype)


def int8(name: str, weight: Tensor) -> tuple[State, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    stored = (weight / scale).round().to(torch.int8)
    return {name: stored, f"{name}_scale": scale}, (stored.float() * scale).to(weight.dtype)


class Pair:
    """A folder in few bits, and the dense folder that it stands for."""

    def __init__(self, model: Any, path: Path, quantise: Quantise, quantization: object):
        self.few, self.dense = path / "few", path / "dense"
        model.save_pretrained(self.few)
        shutil.copytree(self.few, self.dense)
        made = {
            name: quantise(name, weight)
            for name, weight in load_file(self.few / "model.safetensors").items()
            if name.endswith(("_proj.weight", "_with_mqa.weight"))
        }
        rewritten(self.dense, lambda state: state | {name: dense for name, (_, dense) in made.items()})
        stored = {name: tensor for tensors, _ in made.values() for name, tensor in tensors.items()}
        more = {} if quantization is None else {"quantization_config": quantization}
        rewritten(self.few, lambda state: state | stored, **more)

    def packed(self, path: Path, **options: Any) -> tuple[Path, Any]:
        """Pack both, see that they are the same, and return the folder with its report."""
        report = seedpack.compress(self.few, path / "packed", codec=CODEC, **options)
        seedpack.compress(self.dense, path / "expected", codec=CODEC, **options)
        files = [path / name / "model.safetensors" for name in ("packed", "expected")]
        assert files[0].read_bytes() == files[1].read_bytes()
        configs = [json.loads((file.parent / "config.json").read_text()) for file in files]
        assert configs[0] == configs[1] and configs[0]["quantization_config"]["quant_method"] == "seedpack"
        return path / "packed", report


def test_deepseek_in_float8_blocks(tmp_path: Path) -> None:
    pair = Pair(deepseek(), tmp_path, in_blocks, FP8)
    packed, report = pair.packed(tmp_path)
    assert report.notes == ("float8 (blocks of 16x16), dequantised to BF16",)
    tensors = load_file(pair.few / "model.safetensors").values()
    assert report.plan.totals()["source_bytes"] == sum(tensor.nbytes for tensor in tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(packed)
    assert torch.isfinite(output(model)).all()
    kinds = {t.name: t.kind for t in report.plan.tensors}
    assert kinds["model.layers.1.mlp.experts.3.up_proj.weight"] == "expert"
    assert kinds["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == "linear"


def test_a_folder_whose_config_lost_it(tmp_path: Path) -> None:
    pair = Pair(deepseek(), tmp_path, in_blocks, None)
    found, expected = open_source(pair.few), open_source(pair.dense)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.read(name), expected.read(name)) for name in found.tensors)


def test_transformers_makes_the_same_of_it(tmp_path: Path) -> None:
    pair = Pair(llama(tie_word_embeddings=True), tmp_path, in_blocks, FP8)
    dequantise = transformers.FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True)
    model = transformers.LlamaForCausalLM.from_pretrained(pair.few, quantization_config=dequantise)
    source = open_source(pair.few)
    assert all(torch.equal(model.get_parameter(name), source.read(name)) for name in source.tensors)


@pytest.mark.parametrize(
    ("quantise", "note"),
    [
        (per_row, "float8 (one scale per row), dequantised to F32"),
        (per_tensor, "float8 (one scale per tensor), dequantised to F32"),
        (int8, "int8 (one scale per row), dequantised to F32"),
    ],
)
def test_compressed_tensors(tmp_path: Path, quantise: Quantise, note: str) -> None:
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    pair = Pair(llama(tie_word_embeddings=True), tmp_path, quantise, quantization)
    kv_scale = {"model.layers.0.self_attn.k_scale": torch.tensor(1.0)}
    rewritten(pair.few, lambda state: state | kv_scale)
    _, report = pair.packed(tmp_path)
    dropped = open_source(pair.few).dropped
    assert report.notes == (note,) and "model.layers.0.self_attn.k_scale" in dropped
    assert ("model.layers.1.mlp.up_proj.input_scale" in dropped) == (quantise is per_tensor)


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = transformers.GptOssConfig(**{**SMALL, **ROUTED, "num_hidden_layers": 1}, head_dim=8, num_local_experts=2)
    transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "oss")
    stored: State = {}
    for name, (rows, groups) in {"gate_up_proj": (128, 1), "down_proj": (32, 2)}.items():
        prefix = f"model.layers.0.mlp.experts.{name}"
        stored[f"{prefix}_blocks"] = torch.randint(256, (2, rows, groups, 16), dtype=torch.uint8)
        stored[f"{prefix}_scales"] = torch.randint(0, 255, (2, rows, groups), dtype=torch.uint8)
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}

    def without_dense(state: State) -> State:
        return {n: t for n, t in state.items() if n.rpartition(".")[2] not in ("gate_up_proj", "down_proj")} | stored

    source = open_source(rewritten(tmp_path / "oss", without_dense, quantization_config=quantization))
    assert source.notes == ["MXFP4 (groups of 32), dequantised to BF16"]
    expected = {
        name.removesuffix("_blocks"): convert_moe_packed_tensors(blocks, stored[name.replace("_blocks", "_scales")])
        for name, blocks in stored.items()
        if name.endswith("_blocks")
    }
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())
    small = {name: t.clamp(118, 126) if name.endswith("_scales") else t for name, t in stored.items()}
    rewritten(tmp_path / "oss", lambda state: state | small)
    report = seedpack.compress(tmp_path / "oss", tmp_path / "packed", codec=CODEC)
    source_bytes = sum(t.nbytes for t in load_file(tmp_path / "oss" / "model.safetensors").values())
    assert report.plan.totals()["source_bytes"] == source_bytes
    name = "model.layers.0.mlp.experts.down_proj"
    tensor = next(t for t in report.plan.tensors if t.name == name)
    dense = convert_moe_packed_tensors(small[f"{name}_blocks"], small[f"{name}_scales"])
    parts = tensor.codec.encode(dense.reshape(tensor.codec_shape).float())
    decoded = tensor.codec.decode(parts, tensor.codec_shape, torch.bfloat16).view(dense.shape)
    experts: Any = transformers.AutoModelForCausalLM.from_pretrained(report.path).model.layers[0].mlp.experts
    assert torch.equal(experts.down_proj + 0, decoded)


def test_a_part_of_the_config_says_it(tmp_path: Path) -> None:
    text = {**SMALL, **ROUTED, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    pair = Pair(transformers.Gemma3ForConditionalGeneration(config), tmp_path, in_blocks, None)
    parts = json.loads((pair.few / "config.json").read_text())
    nested = {**parts["text_config"], "quantization_config": FP8}
    rewritten(pair.few, dict, text_config=nested)
    packed, _ = pair.packed(tmp_path)
    assert "quantization_config" not in json.loads((packed / "config.json").read_text())["text_config"]
    nested["quantization_config"] = {"quant_method": "awq"}
    with pytest.raises(
        ModelError, match=r"is quantised already \(by awq\); start from the dense model, or from one in"
    ):
        open_source(rewritten(pair.few, dict, text_config=nested))


def test_a_dense_folder_whose_config_says_float8(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    rewritten(tmp_path / "dense", dict, quantization_config=FP8)
    (tmp_path / "dense" / "hf_quant_config.json").write_text("{}")
    source = open_source(tmp_path / "dense")
    assert not source.notes and source.dropped == ["hf_quant_config.json"]
    seedpack.compress(source, tmp_path / "packed", codec=CODEC)
    assert not (tmp_path / "packed" / "hf_quant_config.json").exists()


def damaged(folder: Path, change: Callable[[State], State], **config: Any) -> str:
    with pytest.raises(ModelError) as error:
        open_source(rewritten(folder, change, **config)).fingerprint  # noqa: B018 (reads all tensors)
    return str(error.value)


def test_scales_that_are_missing_or_wrong(tmp_path: Path) -> None:
    pair = Pair(llama(), tmp_path, in_blocks, FP8)
    state = load_file(pair.few / "model.safetensors")
    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"

    def becomes(value: Tensor) -> str:
        return damaged(pair.few, lambda _: state | {scale: value})

    message = becomes(torch.ones(2, 2))
    assert f"tensor {scale!r}: has shape [2, 2] for" in message and "expected [4, 2] for blocks of 16x16" in message
    assert "2 of 8 scales are NaN or Inf" in becomes(torch.tensor([float("nan")] * 2 + [1.0] * 6).reshape(4, 2))
    assert "is I32, expected one of BF16" in becomes(torch.ones(4, 2, dtype=torch.int32))
    message = damaged(pair.few, lambda _: {name: t for name, t in state.items() if name != scale})
    assert "'model.layers.0.mlp.up_proj.weight': is F8_E4M3 without a scale, as are 0 more; expected" in message
    plain = {name: tensor for name, tensor in state.items() if not name.endswith("_scale_inv")}
    assert "is F8_E4M3 without a scale, as are 13 more" in damaged(pair.few, lambda _: plain)
    config = {key: value for key, value in open_source(pair.dense).config.items() if key != "quantization_config"}  # type: ignore[union-attr]
    (pair.few / "config.json").write_text(json.dumps(config))
    assert not open_source(pair.few).notes, "float8 without any scale is float8"


def test_calibration_runs_the_dense_model(tmp_path: Path) -> None:
    text = Calibration("self", 64, 16)
    pair = Pair(llama(tie_word_embeddings=True), tmp_path, in_blocks, FP8)
    packed, _ = pair.packed(tmp_path, calibration=text)
    assert packed.is_dir()


def test_the_command_line_tells(tmp_path: Path) -> None:
    pair = Pair(llama(), tmp_path, per_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"})
    done = CliRunner().invoke(cli, ["compress", str(pair.few), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "source: float8 (one scale per tensor), dequantised to F32\n" in done.output
    assert "ignored, as no weights: model.layers.0.mlp.down_proj.input_scale" in done.output
    assert "and 8 more" in done.output


def test_what_configs_say() -> None:
    groups = {"group_0": {"weights": {"block_structure": [128, 64]}}, "group_1": {"weights": None}}
    config = {"a": {"b": {"quantization_config": FP8}}, "compression_config": {"config_groups": groups}, "c": [1]}
    assert block_sizes(quantizations(config)) == [(BLOCK, BLOCK), (128, 64)]
    assert without_quantization(config) == {"a": {"b": {}}, "c": [1]} and not quantizations(
        {"quantization_config": None}
    )
    assert not block_sizes([{"weight_block_size": [0, 1]}, {"weight_block_size": [1]}, {"config_groups": 3}])
    assert dense_dtype({"dtype": "float8_e4m3fn", "text_config": {"dtype": "float32"}}) == "F32"
