"""Layers packed one after the other make up for what those before them lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import seedpack
from seedpack import Calibration
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.calibration import layerwise, sequence
from seedpack.converter.calibration.layerwise import LayerInputs, layer_by_layer
from seedpack.converter.calibration.sequence import DecoderLayer, Group
from seedpack.converter.statistics import SHIFT
from seedpack.errors import ModelError
from seedpack.hf.internals import decoder_layers
from seedpack.hf.language_model import open_pretrained
from seedpack.loader.layers import is_transposed
from tests.helpers.marks import slow
from tests.helpers.models import ARCHITECTURES, gemma4

TOKENS = torch.randint(3, 96, (24, 16), generator=torch.Generator().manual_seed(1))


def packed(model: Any, noise: float, tokens: Tensor = TOKENS) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Pack weights as themselves and their shifts, with noise; return what was measured, and the last hidden states of the packed
    model and of the original."""
    opened, found, outputs = open_pretrained(model), dict[str, Tensor](), []
    weights = {
        name: p
        for name, p in model.named_parameters()
        if p.dim() == 2 and ".layers." in f".{name}".replace(".h.", ".layers.")
    }

    @contextmanager
    def pack(values: dict[str, Tensor]) -> Iterator[None]:
        before = {name: weights[name].clone() for name in values if name in weights}
        for number, (name, value) in enumerate(before.items()):
            shift = values.get(name + SHIFT, torch.zeros(1, 1)).to(value.dtype)
            generator = torch.Generator().manual_seed(len(found) + number)
            errors = noise * value.float().std() * torch.randn(value.shape, generator=generator)
            weights[name].copy_(value + (shift.mT if is_transposed(model.get_submodule(name[:-7])) else shift) + errors)
        yield
        for name, value in before.items():
            weights[name].copy_(value)

    def done(layer: str, values: dict[str, Tensor], output: Tensor | None) -> None:
        found.update(values)
        if output is not None:
            outputs.append(output.clone())

    call = sequence.packing(opened, done, lambda layer, hidden: None, weights, pack)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layerwise.run(opened, tokens, done, call)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    originals: list[Tensor] = []
    layerwise.run(
        opened, tokens, lambda *_: None,
        layerwise.measuring(opened, lambda layer, values, out: originals.append(out.clone()), lambda *_: None),  # type: ignore[union-attr]
    )  # fmt: skip
    return found, outputs[-1].float(), originals[-1].float()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", *slow("qwen3", "mixtral", "qwen3-moe", "llama-tied")])
def test_what_later_weights_are_shifted_by_brings_the_stream_nearer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    for parameter in model.parameters():  # as untrained ones are, layers hardly add anything to the stream
        if parameter.dim() == 2:
            parameter.data *= 4
    monkeypatch.setattr(layerwise, "TOKENS_AT_ONCE", 100)
    found, hidden, original = packed(model, 0.3)
    assert any(key.endswith(SHIFT) for key in found)
    monkeypatch.setattr(sequence, "STEP", 0.0)
    _, without, same = packed(model, 0.3)
    assert torch.equal(original, same)
    assert float((hidden - original).norm()) < 0.97 * float((without - original).norm())


def groups_of(model: Any) -> list[Group]:
    opened, found = open_pretrained(model), list[list[Group]]()

    def call(name: str, forward: Any, inputs: LayerInputs) -> Any:
        layer = DecoderLayer(name, model.get_submodule(name), forward, inputs, inputs.hidden, ())
        found.append([
            Group([leaf(n, name) for n in group.names], {leaf(n, name): leaf(s, name) for n, s in group.streams.items()}, group.ends)
            for group in layer._look()
        ])  # fmt: skip
        return forward(*inputs.args, **inputs.kwargs)

    with layer_by_layer(model, opened.layer_names, call), torch.inference_mode():
        model(input_ids=TOKENS[:2], use_cache=False)
    assert all(groups == found[0] for groups in found)
    return found[0]


def leaf(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}.").rpartition(".")[2]


@pytest.mark.parametrize(
    ("name", "expected", "dtype"),
    [
        ("llama", [(["q_proj", "k_proj", "v_proj"], {}), (["o_proj"], {"o_proj": ""}), (["gate_proj", "up_proj"], {}),
                   (["down_proj"], {"down_proj": "post_attention_layernorm"}, True)], torch.float32),
        ("llama", [(["q_proj", "k_proj", "v_proj"], {}), (["o_proj"], {"o_proj": ""}), (["gate_proj", "up_proj"], {}),
                   (["down_proj"], {"down_proj": "post_attention_layernorm"}, True)], torch.bfloat16),
        ("gpt2", [(["c_attn"], {}), (["c_proj"], {"c_proj": ""}), (["c_fc"], {}), (["c_proj"], {"c_proj": "ln_2"}, True)], torch.float32),
        # Norms stand between these outputs and the stream.
        ("gemma3", [(["q_proj", "k_proj", "v_proj"], {}), (["o_proj"], {}), (["gate_proj", "up_proj"], {}), (["down_proj"], {})],
         torch.float32),
    ],
)  # fmt: skip
def test_layers_of_one_input_and_the_streams_that_they_add_to(
    name: str, expected: list[tuple[Any, ...]], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    assert groups_of(ARCHITECTURES[name]().to(dtype).eval()) == [Group(*group) for group in expected]


def test_a_shift_is_a_ridge_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solve for what an output lacks in the stream directly: in the attention's output projection of the second layer."""
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"]().double().eval()
    monkeypatch.setattr(sequence, "STEP", 1.0)
    seen: dict[str, list[Tensor]] = {"x": [], "r": []}
    second: Any = list(decoder_layers(model).values())[1]
    hooks = [
        second.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen["x"].append(args[0].clone())),
        second.input_layernorm.register_forward_pre_hook(lambda m, args: seen["r"].append(args[0].clone())),
    ]
    found, _, _ = packed(model, 0.3)
    for hook in hooks:
        hook.remove()
    whole = {key: [v for v in values if len(v) == len(TOKENS)] for key, values in seen.items()}
    x, r = whole["x"][0], whole["r"][0]  # of the original
    x_packed, r_packed = whole["x"][1], whole["r"][1]
    weight = second.self_attn.o_proj.weight.detach()
    x, r, x_packed, r_packed = (value.flatten(0, 1) for value in (x, r, x_packed, r_packed))
    moment = x_packed.mT @ x_packed / len(x)
    ridge = sequence.DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    wanted = x @ weight.mT + r - r_packed - x_packed @ weight.mT
    solution = torch.linalg.solve(moment + ridge, x_packed.mT @ wanted / len(x)).mT
    shift = found[f"model.layers.1.self_attn.o_proj.weight{SHIFT}"].double()
    torch.testing.assert_close(shift, solution, rtol=0.02, atol=0.01 * float(solution.abs().max()))


def test_reports_compare_with_what_was_fitted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ARCHITECTURES["llama"]().save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"bits": 2, "settings": {"effort": "fast"}, "exclude": ["*embed*", "lm_head*"]}
    calibrations = [Calibration(TOKENS, context=16, sequential=sequential) for sequential in (False, True)]
    plain, shifted = (
        seedpack.compress(tmp_path / "dense", tmp_path / f"out{number}", calibration=calibration, **options)
        for number, calibration in enumerate(calibrations)
    )
    errors = [{t.plan.name: t.error / t.energy for t in report.tensors} for report in (plain, shifted)]
    assert errors[0].keys() == errors[1].keys()
    for name, error in errors[1].items():
        assert error == pytest.approx(errors[0][name], rel=0.35), name


def test_layers_that_do_not_follow_each_other_are_refused() -> None:
    opened = open_pretrained(ARCHITECTURES["llama"]().eval())
    call = sequence.packing(opened, lambda *_: None, lambda *_: None, (), lambda values: nullcontext())

    def other(name: str, forward: Any, inputs: LayerInputs) -> Any:
        out = call(name, forward, inputs)
        return (out[0] + 1,) if isinstance(out, tuple) else out + 1

    with pytest.raises(ModelError, match=r"layers\.1: does not take what the layer before it gives, once"):
        layerwise.run(opened, TOKENS, lambda *_: None, other)


@pytest.mark.parametrize("shared", [0, 1])
def test_layers_that_share_keys_and_values_are_not_packed_in_sequence(shared: int, tmp_path: Path) -> None:
    notes: list[str] = []
    gemma4(shared).save_pretrained(tmp_path / "model")
    seedpack.compress(
        tmp_path / "model", tmp_path / "out", codec=TrellisCodec(3, effort="fast"), calibration=TOKENS,
        progress=lambda stage, done, total, unit="", item="", /: notes.append(item),
    )  # fmt: skip
    said = [note for note in notes if "not in sequence" in note]
    assert len(said) == shared and all("shares keys and values" in note for note in said)
    assert not any("not calibrated" in note for note in notes)


def test_products_are_of_float32_where_a_layer_mixes_no_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "faster_in_bfloat16", lambda device: True)
    layer = torch.nn.Linear(4, 4)

    def quick(forward: Any) -> bool:
        inputs = LayerInputs((torch.ones(2, 3, 4),), {}, 0)
        return DecoderLayer("layer", layer, forward, inputs, torch.ones(2, 3, 4), ())._is_quick

    assert quick(lambda x: x + layer(x))
    assert not quick(lambda x: x.flatten(0, 1).index_add(0, torch.tensor([0]), layer(x)[0, :1]).view(x.shape))
    assert not quick(layer)  # its stream would be bfloat16


def test_values_of_each_sequence_are_taken_with_it() -> None:
    """Take the language of each sequence, one number, and leave whole what has one for each token."""
    hidden = torch.arange(6 * 4 * 2).view(6, 4, 2)
    inputs = LayerInputs((hidden, torch.arange(6)), {"places": torch.arange(4)}, 0)
    some, languages, places = inputs.run_batch(lambda *args, places: (*args, places), slice(2, 4))
    assert torch.equal(some, hidden[2:4]) and languages.tolist() == [2, 3] and places.tolist() == [0, 1, 2, 3]
