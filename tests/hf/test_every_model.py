"""Models that read, tie, rename or write the weights of their layers: packed, they give what their dense rebuild gives."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import seedpack
from seedpack.converter.calibration.store import Store
from seedpack.converter.sources.open import open_source
from seedpack.formats import Checkpoint
from seedpack.hf.checkpoint_names import CheckpointNames
from seedpack.loader.layers import PackedModule, pack_module_
from tests.helpers.marks import slow
from tests.helpers.models import CODEC, ROUTED, SMALL, Folders, llama

TOKENS = {"input_ids": torch.arange(24).reshape(2, 12) % 96}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin()}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {**SMALL, **ROUTED}
SEQUENCES: dict[str, Any] = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SAM = {
    "vision_config": {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 8, "mlp_dim": 64, "num_pos_feats": 8, "global_attn_indexes": [1], "window_size": 2,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "image_embedding_size": 4},
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
}  # fmt: skip
QWEN3_NEXT = {
    **TEXT, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
LLAMA4 = {**TEXT, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 64, "attention_chunk_size": 8}
DBRX = {
    "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 96,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
}  # fmt: skip
DEEPSEEK = {
    **SMALL, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 32, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
MOSTLY_RAW = {"rwkv": 0.35}  # it writes to its weights


def encoder_decoder() -> Any:
    bert = transformers.BertConfig(**{**SMALL, "bos_token_id": None, "eos_token_id": None})
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config)


def gemma3_with_images() -> Any:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=1, image_token_index=95,
        boi_token_index=94, eoi_token_index=93,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def mimi() -> Any:
    """Codebooks are buffers here, of zeros before they are trained."""
    config = transformers.MimiConfig(
        hidden_size=64, num_filters=32, codebook_size=64, codebook_dim=64, vector_quantization_hidden_dimension=64,
        upsample_groups=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
        intermediate_size=64, num_quantizers=4, upsampling_ratios=[4, 2],
    )  # fmt: skip
    model = transformers.MimiModel(config)
    for name, buffer in model.named_buffers():
        if "embed_sum" in name:
            buffer.normal_()
    return model


def of(cls: str, config: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, cls)(getattr(transformers, config)(**settings))


SEQ2SEQ = {**TOKENS, "decoder_input_ids": TOKENS["input_ids"]}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "vit": (of("ViTForImageClassification", "ViTConfig", **VISION), PIXELS),
    "dinov2": (of("Dinov2Model", "Dinov2Config", **{k: v for k, v in VISION.items() if k != "intermediate_size"}), PIXELS),
    "clip": (
        of("CLIPModel", "CLIPConfig", text_config={**SMALL, "eos_token_id": 2}, vision_config=VISION, projection_dim=16),
        {**TOKENS, **PIXELS},
    ),
    "xclip": (  # a matrix of the model's own, in no module
        of("XCLIPModel", "XCLIPConfig", projection_dim=32, prompt_num_attention_heads=4, text_config={**SMALL, "eos_token_id": 2},
           vision_config={**VISION, "mit_hidden_size": 32, "mit_intermediate_size": 64, "mit_num_attention_heads": 4}),
        {**TOKENS, "pixel_values": torch.linspace(-1, 1, 2 * 8 * 3 * 16 * 16).reshape(2, 8, 3, 16, 16).sin()},
    ),
    "sam": (of("SamModel", "SamConfig", **SAM), {
        "pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32).sin(),
        "input_points": torch.tensor([[[[5.0, 9.0]]]]),
    }),
    "gemma3-images": (gemma3_with_images, {
        "input_ids": torch.tensor([[1, 94, 95, 93, 5, 6, 7], [1, 94, 95, 93, 8, 9, 3]]), **PIXELS
    }),
    "whisper": (
        of("WhisperForConditionalGeneration", "WhisperConfig", **SEQUENCES, num_mel_bins=8, max_source_positions=16,
           max_target_positions=16),
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 32).reshape(2, 8, 32).cos(),
         "decoder_input_ids": TOKENS["input_ids"]},
    ),
    "bart": (of("BartForConditionalGeneration", "BartConfig", **SEQUENCES, scale_embedding=True), SEQ2SEQ),
    "encoder-decoder": (encoder_decoder, SEQ2SEQ),
    "mamba": (of("MambaForCausalLM", "MambaConfig", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8), TOKENS),
    "rwkv": (of("RwkvForCausalLM", "RwkvConfig", vocab_size=96, hidden_size=32, num_hidden_layers=2, context_length=32,
                rescale_every=1), TOKENS),
    "olmo": (of("OlmoForCausalLM", "OlmoConfig", **TEXT), TOKENS),
    "qwen3-next": (of("Qwen3NextForCausalLM", "Qwen3NextConfig", **QWEN3_NEXT), TOKENS),
    "gpt-oss": (of("GptOssForCausalLM", "GptOssConfig", **TEXT, head_dim=8, num_local_experts=4, num_experts_per_tok=2), TOKENS),
    "granite-moe": (of("GraniteMoeForCausalLM", "GraniteMoeConfig", **TEXT, num_local_experts=4), TOKENS),
    "llama4": (of("Llama4ForCausalLM", "Llama4TextConfig", **LLAMA4), TOKENS),
    "dbrx": (of("DbrxForCausalLM", "DbrxConfig", **DBRX), TOKENS),
    "deepseek-v3": (of("DeepseekV3ForCausalLM", "DeepseekV3Config", **DEEPSEEK), TOKENS),
    "gte": (of("GteForMaskedLM", "GteConfig", **SMALL), TOKENS),
    "xlnet": (of("XLNetLMHeadModel", "XLNetConfig", vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=64), TOKENS),
    "mimi": (mimi, {"input_values": torch.linspace(-1, 1, 2 * 640).reshape(2, 1, 640).mul(50).sin()}),
    "phimoe": (of("PhimoeForCausalLM", "PhimoeConfig", **TEXT, num_local_experts=4), TOKENS),
}  # fmt: skip


def tensors_of(output: Any) -> list[Tensor]:
    return [value for value in output.to_tuple() if isinstance(value, Tensor) and value.is_floating_point()]


@torch.no_grad()
def run(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    return tensors_of(model.eval()(**inputs))


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    folders = Folders(make(), tmp_path)
    model = folders.cls.from_pretrained(folders.packed)
    expected = run(folders.reference(), inputs)
    model.save_pretrained(tmp_path / "again")  # before it runs: RWKV rescales weights when it does
    found = run(model, inputs)
    same(found, expected)
    totals = folders.report.plan.totals()
    assert totals["packed_tensors"] and any(isinstance(module, PackedModule) for module in model.modules())
    matrices = [t for t in folders.report.plan.tensors if len(t.shape) > 1 and t.dtype == "F32"]
    raw = sum(math.prod(t.shape) for t in matrices if not t.packed) / sum(math.prod(t.shape) for t in matrices)
    assert raw < MOSTLY_RAW.get(name, 0.1), [(t.name, t.note) for t in matrices if not t.packed]
    assert model.dtype == torch.float32
    for a, b in zip(run(folders.cls.from_pretrained(tmp_path / "again"), inputs), found, strict=True):
        assert torch.equal(a, b)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == [folders.cls.__name__]
    same(run(model.dequantize(), inputs), expected)


@pytest.mark.parametrize("name", ["olmo", "bart"])
def test_the_first_parameter_tells_the_dtype(name: str, tmp_path: Path) -> None:
    """Where nothing but packed layers is left (OLMo's norms have no parameters), and where an embedding comes first."""
    folders = Folders(MODELS[name][0](), tmp_path)
    assert name != "olmo" or all(tensor.packed for tensor in folders.report.plan.tensors)
    for dtype in (torch.float32, torch.bfloat16):
        model = folders.cls.from_pretrained(folders.packed, dtype=dtype)
        assert model.dtype == next(nn.Sequential(model, nn.Linear(2, 2)).parameters()).dtype == dtype
        assert all(not parameter.is_meta for parameter in model.parameters())
    model.save_pretrained(tmp_path / "again")
    with Checkpoint(tmp_path / "again") as checkpoint:
        assert not any("no_values" in key for file in checkpoint.files for key in file.header.tensors)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_other_implementations_of_experts(implementation: str, tmp_path: Path) -> None:
    make, inputs = MODELS["gpt-oss"]
    folders = Folders(make(), tmp_path)
    model = folders.cls.from_pretrained(folders.packed)
    expected = run(model, inputs)
    model.set_experts_implementation(implementation)
    same(run(model, inputs), expected)


def test_layers_that_the_model_writes_to_stay_raw() -> None:
    model = MODELS["rwkv"][0]()
    names = CheckpointNames(model.to("meta"))
    kinds = {name: names.kind(name, tuple(value.shape))[0] for name, value in model.state_dict().items()}
    assert kinds["rwkv.blocks.1.attention.output.weight"] == kinds["rwkv.blocks.1.feed_forward.value.weight"] == ""
    assert kinds["rwkv.blocks.1.attention.key.weight"] == kinds["rwkv.blocks.1.feed_forward.key.weight"] == "linear"


@pytest.mark.parametrize(
    "name", ["llama4", "rwkv", *slow("mamba", "qwen3-next", "gpt-oss", "dbrx", "deepseek-v3", "olmo")]
)
def test_calibration(name: str, tmp_path: Path) -> None:
    """Calibrate a model whose base model is itself, and one whose layers give more than hidden states."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    model.save_pretrained(tmp_path / "dense")
    tokens = torch.randint(0, 96, (8, 12), generator=torch.Generator().manual_seed(0))
    inputs: list[Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda layer, args: inputs.append(args[0].flatten(0, -2)))
    run(model, {"input_ids": tokens})
    options: dict[str, Any] = {
        "codec": CODEC,
        "calibration": seedpack.Calibration(tokens, context=12, sequential=False),
    }
    seedpack.compress(tmp_path / "dense", tmp_path / "packed", **options)
    (file,) = (tmp_path / "seedpack-calibration").glob("*/index.json")
    index = json.loads(file.read_text())
    store = Store(file.parent, index["made_of"])
    head = next(name for name in index["weights"] if name.endswith(("head.weight", "embed_out.weight")))
    torch.testing.assert_close(store.get(head), inputs[0].mT @ inputs[0] / len(inputs[0]), rtol=1e-3, atol=1e-4)
    seedpack.compress(tmp_path / "dense", tmp_path / "sequence", codec=CODEC, calibration=tokens)


class TestOtherArchitectures:
    """A packed language model, loaded without its head or with another."""

    @pytest.fixture
    def folders(self, tmp_path: Path) -> Folders:
        return Folders(llama(tie_word_embeddings=False), tmp_path)

    def test_base_model(self, folders: Folders, tmp_path: Path) -> None:
        model = transformers.AutoModel.from_pretrained(folders.packed)
        assert type(model).__name__ == "LlamaModel"
        same(run(model, TOKENS), run(folders.reference().model, TOKENS))
        model.save_pretrained(tmp_path / "base")
        again = transformers.AutoModel.from_pretrained(tmp_path / "base")
        assert all(torch.equal(a, b) for a, b in zip(run(again, TOKENS), run(model, TOKENS), strict=True))
        with Checkpoint(tmp_path / "base") as checkpoint:
            assert not any("lm_head" in name for name in checkpoint.manifest.tensors)

    def test_another_head(self, folders: Folders) -> None:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folders.packed, num_labels=3)
        assert model.score.weight.shape == (3, 32) and not isinstance(model.score, PackedModule)
        same(
            [model.model(**TOKENS).last_hidden_state.detach()],
            [folders.reference().model(**TOKENS).last_hidden_state.detach()],
        )

    def test_nothing_that_fits(self, folders: Folders) -> None:
        packed = json.loads((folders.packed / "config.json").read_text())["quantization_config"]
        config: Any = transformers.BertConfig(**SMALL)
        config.quantization_config = packed
        with pytest.raises(seedpack.SeedpackError, match="BertModel has no layer for 16 of the packed tensors"):
            transformers.BertModel.from_pretrained(folders.packed, config=config)


def test_subfolders_come_along(tmp_path: Path) -> None:
    """Processors, chat templates, and the modules of sentence-transformers with their weights; other weights do not."""
    llama().save_pretrained(tmp_path / "dense")
    files = {
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]), "1_Pooling/config.json": "{}",
        "2_Dense/model.safetensors": "weights", "additional_chat_templates/tool_use.jinja": "{{ }}",
        "onnx/model.onnx": "large", ".cache/x": "", "LICENSE": "Apache",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / "dense" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "dense" / name).write_text(text)
    seedpack.compress(tmp_path / "dense", tmp_path / "packed", codec=CODEC)
    seedpack.unpack(tmp_path / "packed", tmp_path / "unpacked")
    for folder in ("packed", "unpacked"):
        kept = {
            path.relative_to(tmp_path / folder).as_posix() for path in (tmp_path / folder).rglob("*") if path.is_file()
        }
        assert kept - {"config.json", "generation_config.json", "model.safetensors", "seedpack.json"} == files.keys() - {
            "onnx/model.onnx", ".cache/x",
        }  # fmt: skip
    shutil.rmtree(tmp_path / "dense")


def test_a_packed_module_is_no_source() -> None:
    layer = nn.Linear(64, 48)
    net = nn.Sequential(pack_module_(layer, CODEC, CODEC.encode(layer.weight.detach())))
    with pytest.raises(seedpack.SeedpackError, match="Sequential: its layer '0' is packed already"):
        open_source(net)
