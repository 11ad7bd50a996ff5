"""Adapters of peft on packed models: each works as on the dense model, or ends in one sentence that says what to do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from seedpack.errors import ModelError
from seedpack.loader.layers import PackedModule
from tests.helpers.models import IDS, ROUTED, SMALL, Folders, llama

peft = pytest.importorskip("peft")
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear"),
    "lora on an embedding": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **TARGETS),
    "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, **TARGETS),
    "orthogonal": lambda: peft.LoraConfig(r=4, init_lora_weights="orthogonal", **TARGETS),
    "tokens": lambda: peft.LoraConfig(r=4, trainable_token_indices=[3], **TARGETS),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, **TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, **TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, **TARGETS),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, **TARGETS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **TARGETS),
    "vera": lambda: peft.VeraConfig(r=4, **TARGETS),
}  # fmt: skip
REFUSED: dict[str, tuple[Any, str]] = {
    "pissa": (lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", **TARGETS), "read-only: .*dequantize"),
    "olora": (lambda: peft.LoraConfig(r=4, init_lora_weights="olora", **TARGETS), "read-only: .*dequantize"),
    "modules_to_save": (
        lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **TARGETS),
        "modules_to_save: a packed Linear cannot be trained itself; leave it raw .*dequantize",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(llama(tie_word_embeddings=False), tmp_path_factory.mktemp("peft"))


def adapted(model: Any, make: Any) -> Any:
    torch.manual_seed(0)
    net = peft.get_peft_model(model, make())
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            noise = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=noise)
    return net.eval()


def logits_and_gradients(net: Any) -> dict[str, Tensor]:
    output = net(input_ids=IDS, labels=IDS)
    output.loss.backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.requires_grad and p.grad is not None}
    return {"logits": output.logits.detach(), **found}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_adapter(kind: str, folders: Folders) -> None:
    packed = adapted(folders.cls.from_pretrained(folders.packed), KINDS[kind])
    assert any(isinstance(module, PackedModule) for module in packed.modules())
    found = logits_and_gradients(packed)
    expected = logits_and_gradients(adapted(folders.reference(), KINDS[kind]))
    assert found.keys() == expected.keys() and len(found) > 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5, msg=name)
    with pytest.raises(ModelError, match="read-only: .*dequantize"):
        packed.merge_and_unload()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, folders: Folders) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(ModelError, match=message):
        adapted(folders.cls.from_pretrained(folders.packed), make)
    dense = folders.cls.from_pretrained(folders.packed).dequantize()
    adapted(dense, make).merge_and_unload()


@pytest.mark.filterwarnings("ignore")
def test_modules_to_save_that_were_left_raw(tmp_path: Path) -> None:
    folders = Folders(llama(tie_word_embeddings=False), tmp_path, exclude=["lm_head*"])
    net = adapted(folders.cls.from_pretrained(folders.packed), REFUSED["modules_to_save"][0])
    assert any("modules_to_save" in name for name in logits_and_gradients(net))
    assert copy.deepcopy(net)(input_ids=IDS).logits.shape == (2, 12, 96)


@pytest.mark.filterwarnings("ignore")
def test_parameters_of_packed_experts(tmp_path: Path) -> None:
    """It names no layer, so peft would pass them over, and train or load an adapter of less."""
    config = transformers.GptOssConfig(**SMALL, **ROUTED, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    folders = Folders(transformers.GptOssForCausalLM(config), tmp_path)
    lora = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(
        ModelError, match="target_parameters: 'mlp.experts.gate_up_proj' is packed, and peft cannot add to it"
    ):
        peft.get_peft_model(folders.cls.from_pretrained(folders.packed), lora)
    peft.get_peft_model(folders.reference(), lora)
