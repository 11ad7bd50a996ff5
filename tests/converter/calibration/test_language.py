"""Language models: run layer by layer, interrupted and resumed, on text of every origin."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import seedpack
from benchmarks.language.architectures.cases import all_cases
from benchmarks.language.architectures.models import build
from seedpack import Calibration, CompressOptions, unpack
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.calibration import layerwise, moments, store, tokens
from seedpack.converter.calibration.calibrate import calibrate
from seedpack.converter.calibration.layerwise import LayerDone, SkipLayer
from seedpack.converter.calibration.store import Store
from seedpack.converter.journal import write_file
from seedpack.converter.run import Run
from seedpack.converter.sources.base import Source
from seedpack.converter.sources.open import open_source
from seedpack.errors import ModelError, OutputError
from seedpack.eval.language import compare_language_models, windows
from seedpack.hf import language_model, own_text
from seedpack.hf.internals import decoder_layers
from seedpack.hf.language_model import open_pretrained
from seedpack.hf.own_text import generate_tokens
from tests.helpers.marks import slow
from tests.helpers.models import ARCHITECTURES, ROUTED, SMALL, gemma4, llama
from tests.helpers.plans import bits_of

CPU = torch.device("cpu")
FAST = TrellisCodec(3, effort="fast")
DECODERS = ["llama", "llama-tied", "qwen3", "gemma3", "gemma4", "gpt2", "mixtral"]


def calibrated(source: Source, calibration: Calibration, output: Path) -> Any:
    with Run(source, CompressOptions(calibration=calibration), output) as run:
        return calibrate(run).moments


def ids(count: int = 6, context: int = 16) -> Tensor:
    return torch.randint(3, 96, (count, context), generator=torch.Generator().manual_seed(1))


def read(model: Any, tokens: Tensor, layer_done: LayerDone, skip: SkipLayer = lambda layer, hidden: None) -> None:
    opened = open_pretrained(model)
    layerwise.run(opened, tokens, layer_done, layerwise.measuring(opened, layer_done, skip))


@pytest.mark.parametrize("name", DECODERS)
def test_layer_by_layer_is_as_the_whole_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "TOKENS_AT_ONCE", 40)  # two sequences at a time
    model, found = ARCHITECTURES.get(name, gemma4)(), {}
    read(model, ids(), lambda layer, values, output: found.update(values))
    expected = moments.run(model, list(ids().split(2)), CPU)
    assert found.keys() == expected.keys() and any("lm_head" in weight for weight in found)
    for weight, value in expected.items():
        torch.testing.assert_close(found[weight], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))
    layers = decoder_layers(model).values()
    assert len(list(layers)) == 2 and not any("forward" in vars(layer) for layer in layers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_several_streams_of_hidden_states() -> None:
    """Layers that take several hidden states of each token, as DeepSeek V4's."""
    torch.manual_seed(0)
    model: Any = llama(tie_word_embeddings=False).eval()
    for layer in model.model.layers:

        def forward(hidden: Tensor, *args: Any, of_one: Any = layer.forward, **kwargs: Any) -> Tensor:
            return hidden + torch.stack((of_one(hidden.mean(2), *args, **kwargs), hidden[:, :, 0]), 2)

        layer.forward = forward
    embed, norm = model.model.embed_tokens.forward, model.model.norm.forward
    model.model.embed_tokens.forward = lambda ids: torch.stack((embed(ids), embed(ids) / 2), 2)
    model.model.norm.forward = lambda hidden: norm(hidden.mean(2))
    expected = moments.run(model, list(ids().split(2)), CPU)
    found: dict[str, Tensor] = {}
    read(model, ids(), lambda name, values, output: found.update(values))
    for weight, value in expected.items():
        torch.testing.assert_close(found[weight], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("hrm_text", "runs its layer .* more than once"), ("zaya", "passes more from layer to layer than hidden states")],
)
def test_layers_that_do_not_follow_each_other_alone(kind: str, message: str) -> None:
    case = next(case for case in all_cases() if case.model_type == kind and case.class_name.endswith("ForCausalLM"))
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=message):
        layerwise.require_separable(open_pretrained(build(case)[0].float()), ids())


def test_a_head_that_is_not_called_has_no_moment() -> None:
    model: Any = llama(tie_word_embeddings=False).eval()
    found: dict[str, Tensor] = {}
    weight = model.lm_head.weight

    def forward(**kwargs: Any) -> Any:
        return model.model(**kwargs)[0] @ weight.mT

    model.forward = forward
    read(model, ids(), lambda name, values, output: found.update(values))
    assert "model.layers.1.mlp.down_proj.weight" in found and "lm_head.weight" not in found


def test_self_written_text_fits_the_model_better_and_is_kept(folder: Path, tmp_path: Path) -> None:
    calibration = Calibration("self", tokens=512, context=32, sequential=False)
    reports = [
        seedpack.compress(folder, tmp_path / name, codec=FAST, calibration=text)
        for name, text in (("plain", None), ("fitted", calibration), ("again", calibration))
    ]
    codecs = {t.name: t.codec for t in reports[1].plan.tensors if t.packed}
    assert all(not codec.circular for codec in codecs.values())  # type: ignore[attr-defined]
    found = calibrated(open_source(folder), calibration, tmp_path / "x")
    head = found.get("lm_head.weight")
    assert head is not None and "model.embed_tokens.weight" in codecs  # the tied embedding is fitted as the head
    errors = []
    for name in ("plain", "fitted"):
        error = 0.0
        decoded = seedpack.load(tmp_path / name, dense=True)
        for weight, packed in decoded.items():
            h = head if weight == "model.embed_tokens.weight" else found.get(weight)
            if h is not None:
                e = packed - open_source(folder).read(weight)
                error += float((e @ h * e).sum() / h.diagonal().mean())
        errors.append(error)
    assert errors[1] < 0.9 * errors[0]
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "fitted" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)
    (kept,) = (tmp_path / "seedpack-calibration").iterdir()
    index = json.loads((kept / "index.json").read_text())
    assert index["layers"][-1] == "" and index["made_of"]["text"] == "self"
    assert not list(kept.glob("*.partial")) and not (kept / "output.safetensors").exists()


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_an_interrupted_calibration_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "TOKENS_AT_ONCE", 40)
    ARCHITECTURES.get(name, gemma4)().save_pretrained(tmp_path / "model")
    source, calibration = open_source(tmp_path / "model"), Calibration(ids(), context=16)
    whole = calibrated(source, calibration, tmp_path / "one" / "x")
    keep, ran = store.Store.add, []

    def interrupted(self: Store, layer: str, *rest: Any) -> None:
        if layer.endswith("1"):
            raise KeyboardInterrupt
        keep(self, layer, *rest)

    monkeypatch.setattr(store.Store, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrated(source, calibration, tmp_path / "two" / "x")
    means = moments.InputMoments.means
    monkeypatch.setattr(store.Store, "add", keep)

    def recorded(self: moments.InputMoments) -> dict[str, Tensor]:
        ran.append(list(self._sums))
        return means(self)

    monkeypatch.setattr(moments.InputMoments, "means", recorded)
    resumed = calibrated(source, calibration, tmp_path / "two" / "x")
    assert not any("layers.0" in name for names in ran for name in names) and ran
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        assert torch.equal(whole.get(name), resumed.get(name))


def test_written_text_is_repeatable_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    model = llama()
    state, done = torch.get_rng_state(), list[int]()
    one = generate_tokens(model, 100, 20, seed=3, progress=done.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.shape == (5, 20) and sum(done) == 90 and bool((one[:, 0] == 1).all())
    assert len(set(one[:, 1].tolist())) > 3  # drawn from the vocabulary, whatever the model would begin with
    short = generate_tokens(model, 6, 2)
    assert short.shape == (3, 2) and bool((short[:, 0] == 1).all())
    assert torch.equal(one, generate_tokens(model, 100, 20, seed=3))
    assert not torch.equal(one, generate_tokens(model, 100, 20, seed=4))


def test_a_generation_config_changes_no_text_that_is_calibrated_on() -> None:
    torch.manual_seed(0)
    model = llama()
    plain = generate_tokens(model, 100, 20)
    config = transformers.GenerationConfig(
        eos_token_id=2, repetition_penalty=1.5, suppress_tokens=[5, 6, 7], num_beams=2, num_return_sequences=2,
        no_repeat_ngram_size=1, cache_implementation="static",
    )  # fmt: skip
    model.generation_config = config
    assert torch.equal(generate_tokens(model, 100, 20), plain)
    assert model.generation_config is config


def test_text_begins_with_the_first_token_of_a_config_within_another() -> None:
    text = transformers.Gemma3TextConfig(**SMALL, **ROUTED, head_dim=8)
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=text,
            vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
        )
    )
    assert getattr(model.config, "bos_token_id", None) is None
    assert bool((generate_tokens(model, 32, 8)[:, 0] == SMALL["bos_token_id"]).all())


def test_tokens_are_drawn_by_their_probability() -> None:
    torch.manual_seed(0)
    model, logits = llama(), list[Tensor]()

    def see(head: Any, hidden: tuple[Tensor], out: Tensor) -> None:
        assert hidden[0].is_contiguous()  # else torch copies the weight for each sequence
        logits.append(out[:, -1])

    model.lm_head.register_forward_hook(see)
    drawn = generate_tokens(model, 12000, 3)[:, 2]
    expected = torch.cat(logits).softmax(-1).sum(0)
    found = torch.bincount(drawn, minlength=len(expected))
    assert float(((found - expected) / expected.sqrt()).square().mean()) < 1.5  # 1 where they are drawn by it


def test_predictions_that_are_no_numbers() -> None:
    model = llama()
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ModelError, match="writes no text: its predictions are no finite numbers; calibrate it on"):
        generate_tokens(model, 64, 16)


@pytest.mark.parametrize("mixes", [False, True])
def test_text_is_written_in_bfloat16_where_that_is_faster(mixes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = llama(), set[torch.dtype]()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(own_text, "faster_in_bfloat16", lambda device: True)
    if mixes:  # a layer that takes float32 alone
        model.model.norm.register_forward_pre_hook(lambda module, args: (args[0] @ torch.eye(args[0].shape[-1]),))

    def see(done: int) -> None:
        seen.update(parameter.dtype for parameter in model.parameters())

    assert generate_tokens(model, 100, 20, progress=see).shape == (5, 20)
    assert seen == {torch.float32 if mixes else torch.bfloat16}
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


class Words:
    """A tokenizer: a character a token."""

    bos_token_id = 95

    def __init__(self, starts: bool = False):
        self._starts = starts

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        start = [self.bos_token_id] if self._starts and add_special_tokens else []
        return {"input_ids": start + [ord(c) % 96 for c in text]}


def test_text_files(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("abcdefghij" * 30)
    lines.write_text('{"text": "abcde"}\n\n{"content": "fghij"}\n"abcdefghij"\n' * 20)
    for file in (plain, lines):
        found = tokens.from_text(tokens.read_texts(file), Words(), 100, 40, "here")
        assert found.tolist() == [[ord("abcdefghij"[i % 10]) % 96 for i in range(40)]] * 2
    found = tokens.from_text(tokens.read_texts(plain), Words(starts=True), 100, 40, "here")
    text = [ord("abcdefghij"[i % 10]) % 96 for i in range(78)]
    assert (
        found.tolist()
        == [[95, *text[:39]], [95, *text[39:]]]
        == windows(Words(starts=True), "abcdefghij" * 9, 40, 90).tolist()
    )
    assert windows(Words(), "abcde", 40, 90).tolist() == [text[:5]]
    with pytest.raises(ModelError, match="here: gives 300 tokens; calibration wants at least one sequence of 400"):
        tokens.from_text(tokens.read_texts(plain), Words(), 800, 400, "here")
    with pytest.raises(ModelError, match="here: gives 0 tokens"):
        tokens.from_text(["", ""], Words(), 800, 400, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00", "cannot be read as text"), (b'{"text": 3}', "line 1: has no text"), (b"{", "cannot be read as text"),
     (b"[" * 100_000, "cannot be read as text")],
    ids=["bytes", "no text", "no json", "deep"],
)  # fmt: skip
def test_bad_text_files(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        list(tokens.read_texts(file))


def test_what_cannot_be_calibrated(folder: Path, tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(64, 64)}
    for model, text, message in (
        (state, "self", "a bare state dict has none to run"),
        (folder, "nothing-there", "no such file, not a data set of the hub"),
        (folder, torch.zeros(3, dtype=torch.long), "token ids must be int64"),
        (folder, ids() + 100, "has 96 tokens, the text has others"),
        (folder, str(folder / "config.json"), "the model has no tokenizer"),
    ):
        with pytest.raises(ModelError, match=message):
            seedpack.compress(model, tmp_path / "out", codec=FAST, calibration=text)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="1 tokens do not fill a sequence of 128; ask for at least 128"):
        Calibration("self", tokens=1)


def test_a_damaged_store_says_so(folder: Path, tmp_path: Path) -> None:
    calibration = Calibration(ids(), context=16)
    found = calibrated(open_source(folder), calibration, tmp_path / "x")
    (kept,) = (tmp_path / "seedpack-calibration").iterdir()
    (kept / "layer-0000.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ModelError, match=r"layer-0000.safetensors: cannot be read .* delete that folder"):
        found.get("model.layers.0.self_attn.q_proj.weight")
    good = json.loads((kept / "index.json").read_text())
    for bad in (
        {"version": 2},
        good | {"layers": 3},
        good | {"weights": {"a": 3}},
        good | {"weights": {"a": ["/etc/passwd", "x"]}},
        [1],
    ):
        (kept / "index.json").write_text(json.dumps(bad))
        with pytest.raises(ModelError, match="holds another calibration"):
            calibrated(open_source(folder), calibration, tmp_path / "x")


def test_budgets_that_are_not_measured_follow_the_rule(folder: Path, tmp_path: Path) -> None:
    calibration = Calibration(ids(24), context=16, measure=False)
    options: dict[str, Any] = {"codec": "trellis", "settings": {"effort": "fast"}, "calibration": calibration}
    report = seedpack.compress(folder, tmp_path / "bits", bits=3.9, **options)
    assert 3.5 < report.plan.totals()["bits_per_packed_weight"] <= 3.9
    by_rule = seedpack.plan(folder, codec="trellis", bits=3.9, settings={"effort": "fast"})
    assert bits_of(report.plan) == bits_of(by_rule)
    size = (tmp_path / "bits" / "model.safetensors").stat().st_size - 300
    report = seedpack.compress(folder, tmp_path / "size", target_size=size, **options)
    assert 0.9 * size < (tmp_path / "size" / "model.safetensors").stat().st_size <= size
    with pytest.raises(ModelError, match="2,000 bytes: the smallest plan takes"):
        seedpack.compress(folder, tmp_path / "small", target_size=2000, **options)
    with pytest.raises(ModelError, match="bits or a target size, not both"):
        seedpack.compress(folder, tmp_path / "both", target_size=size, bits=3, **options)


def test_in_sequence_layers_see_what_packed_ones_give(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = Calibration(ids(24), context=16)
    codec = TrellisCodec(2, effort="fast")
    with monkeypatch.context() as patch:
        patch.setattr("seedpack.converter.calibration.calibrate.remove_unclaimed", lambda folder: None)
        seedpack.compress(folder, tmp_path / "out", codec=codec, exclude=["*embed*"], calibration=calibration)
    assert len(list((tmp_path / "seedpack-calibration").iterdir())) == 1  # the model runs once
    calibrated(open_source(folder), Calibration(ids(24), context=16), tmp_path / "out")
    index = {
        json.loads(file.read_text())["made_of"].get("plan"): file.parent
        for file in (tmp_path / "seedpack-calibration").glob("*/index.json")
    }
    plain = index.pop(None)
    (sequence,) = index.values()
    assert not list(sequence.glob("fitted*"))
    unpack(tmp_path / "out", tmp_path / "decoded")
    packed = type(llama()).from_pretrained(tmp_path / "decoded")
    found: dict[str, Tensor] = {}
    read(packed, ids(24), lambda name, values, output: found.update(values))
    stores = [Store(path, json.loads((path / "index.json").read_text())["made_of"]) for path in (plain, sequence)]
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(stores[1].get(name), found[name], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(stores[0].get(name), found[name], rtol=1e-2, atol=1e-2)  # type: ignore[arg-type]
    assert torch.equal(stores[0].get("model.layers.0.self_attn.q_proj.weight"), found["model.layers.0.self_attn.q_proj.weight"])  # type: ignore[arg-type]  # fmt: skip


def test_an_interrupted_fit_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"codec": FAST, "calibration": Calibration(ids(), context=16)}
    seedpack.compress(folder, tmp_path / "whole" / "out", **options)
    fitted: list[str] = []
    encode = TrellisCodec.encode

    def counted(self: TrellisCodec, *args: Any, **more: Any) -> Any:
        fitted.append("")
        if len(fitted) == 5:
            raise KeyboardInterrupt
        return encode(self, *args, **more)

    monkeypatch.setattr(TrellisCodec, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        seedpack.compress(folder, tmp_path / "parts" / "out", **options)
    assert not (tmp_path / "parts" / "out").exists()
    place = tmp_path / "parts" / ".out.partial"
    kept = sorted((place / "kept").glob("*.safetensors"))
    assert len(kept) == 4
    kept[0].write_bytes(kept[0].read_bytes()[:-3])  # damaged: fitted again
    report = seedpack.compress(folder, tmp_path / "parts" / "out", **options)
    assert len(fitted) == 5 + len(report.tensors) - 3 and not place.exists()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "parts" / "out" / name).read_bytes() == (tmp_path / "whole" / "out" / name).read_bytes()


@pytest.mark.parametrize("name", ["llama-tied", *slow("gpt2")])
def test_tuning_brings_predictions_nearer(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(tmp_path / "dense")
    text = generate_tokens(model, 8192, 64, seed=1)
    kl, codec = [], TrellisCodec(2, effort="fast")
    for tune in (0, 2):
        out = tmp_path / str(tune)
        report = seedpack.compress(
            tmp_path / "dense", out, codec=codec, calibration=Calibration(text, context=64, tune=tune, sequential=False)
        )
        kl.append(compare_language_models(model, [seedpack.load(out)], text[:32])[0].kl_mean)
        state = seedpack.load(out, dense=True)
        error = sum(float((state[t.plan.name] - open_source(tmp_path / "dense").read(t.plan.name)).square().sum()) for t in report.tensors)  # fmt: skip
        assert sum(t.error for t in report.tensors) == pytest.approx(error, rel=1e-4)
    assert kl[1] < 0.98 * kl[0]
    norm = next(n for n in state if n.endswith(("norm.weight", "ln_f.weight")))
    assert not torch.equal(state[norm], torch.ones_like(state[norm]))


def test_models_larger_than_memory_stay_on_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration(ids(), context=16)
    whole = calibrated(open_source(folder), calibration, tmp_path / "one" / "x")
    monkeypatch.setattr(language_model, "free_bytes", lambda: 1000)
    source = open_source(folder)
    model = source.open_model().module
    assert all(p.is_meta for p in decoder_layers(model)["model.layers.1"].parameters())
    found = calibrated(source, calibration, tmp_path / "two" / "x")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        torch.testing.assert_close(whole.get(name), found.get(name))
    for more, message in (
        (
            {"sequential": True},
            r"cannot be packed in sequence \(it does not fit memory\); leave that out",
        ),
        ({"tune": 1}, "tuning needs it there twice"),
    ):
        with pytest.raises(ModelError, match=message):
            seedpack.compress(folder, tmp_path / "out", codec=FAST, calibration=Calibration(ids(), context=16, **more))
    report = seedpack.compress(folder, tmp_path / "out", codec="trellis", bits=3.9, settings={"effort": "fast"}, calibration=calibration)  # fmt: skip
    assert report.plan.totals()["bits_per_packed_weight"] <= 3.9


@pytest.mark.parametrize("options", [{"sequential": True}, {"tune": 1}, *slow({"text": "self"})], ids=str)
@pytest.mark.parametrize("dtype", [*slow(torch.float32), torch.bfloat16], ids=str)
def test_a_live_model_is_left_as_it_was(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True).to(dtype).train()
    model.model.layers[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibration = Calibration(**{"text": ids(), "tokens": 32, "context": 16} | options)  # type: ignore[arg-type]
    seedpack.compress(model, tmp_path / "out", codec=FAST, calibration=calibration)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("make", [llama, lambda: torch.nn.Linear(8, 8)], ids=["llama", "a layer"])
def test_a_live_model_goes_back_to_its_device(make: Any, tmp_path: Path) -> None:
    model = make()
    with Run(open_source(model), CompressOptions(), tmp_path / "out") as run:
        vars(run.source)["_device"] = torch.device("meta")  # as if it came from there
        assert all(parameter.device == CPU for parameter in model.parameters())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["falcon", "bloom"])
def test_layers_that_give_tuples_and_take_biases_of_heads(name: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0}
    model = (
        transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, num_hidden_layers=2, alibi=True))
        if name == "falcon" else transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, n_layer=2))
    )  # fmt: skip
    found: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(layer: str, values: dict[str, Tensor], output: Tensor | None) -> None:
        found.update(values)
        if output is not None:
            outputs[layer] = output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise, "TOKENS_AT_ONCE", 40)
        read(model, ids(), keep)
    whole, first = dict(found), min(outputs)
    for weight, value in moments.run(model, [ids()], CPU).items():
        torch.testing.assert_close(whole[weight], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))
    found.clear()
    read(model, ids(), keep, lambda layer, hidden: outputs[layer] if layer == first else None)
    assert all(torch.allclose(value, whole[weight], rtol=1e-3, atol=1e-4) for weight, value in found.items())


def test_what_language_models_cannot_do(tmp_path: Path) -> None:
    for name, options, message in (
        ("t5", {}, "calibration on text is for causal language models"),
        ("llama", {"text": ids(2, 80)}, "takes 64 tokens at most, the text has sequences of 80"),
        ("mixtral", {"tune": 1}, "tuning does not know mixtures"),
    ):
        ARCHITECTURES[name]().save_pretrained(tmp_path / name)
        calibration = Calibration(**{"text": ids(), "context": 16} | options)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=message):
            seedpack.compress(tmp_path / name, tmp_path / "out", codec=FAST, calibration=calibration, exclude=["*.wo.weight"] if name == "t5" else [])  # fmt: skip


def test_a_kill_between_an_output_and_its_index(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, calibration = open_source(folder), Calibration(ids(), context=16)
    whole = calibrated(source, calibration, tmp_path / "one" / "x")
    write, count = write_file, [0]

    def killed(path: Path, content: Any) -> None:
        count[0] += path.name == "index.json"
        if path.name == "index.json" and count[0] == 2:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(store, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrated(source, calibration, tmp_path / "two" / "x")
    monkeypatch.setattr(store, "write_file", write)
    resumed = calibrated(source, calibration, tmp_path / "two" / "x")
    for name in ("model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        assert torch.equal(whole.get(name), resumed.get(name))


def test_tuning_needs_text(folder: Path, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(ModelError, match="tuning is for language models"):
        seedpack.compress(net, tmp_path / "out", codec=FAST, calibration=Calibration([torch.randn(9, 64)], tune=1))
    assert not (tmp_path / "out").exists()


def test_any_module_on_batches(tmp_path: Path) -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64 * 36, 32)
    )
    batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    errors = []
    for calibration in (None, batches):
        seedpack.compress(net, tmp_path / "out.safetensors", codec=FAST, calibration=calibration, force=True)
        state = seedpack.load(tmp_path / "out.safetensors", dense=True)
        packed = torch.nn.Sequential(*(type(m)(3, 64, 3) if isinstance(m, torch.nn.Conv2d) else type(m)(64 * 36, 32) if isinstance(m, torch.nn.Linear) else m for m in net))  # fmt: skip
        packed.load_state_dict(state)
        with torch.no_grad():
            errors.append(sum(float((net(x) - packed(x)).square().sum()) for x in batches))
    assert errors[1] < 0.9 * errors[0] and not (tmp_path / "seedpack-calibration").exists()


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **keywords: Any) -> Any:
        asked.append((args, keywords))
        if args[0] == "org/gone":
            raise FileNotFoundError("no such data set")
        return iter([{"content" if args[0] == "org/code" else "text": "alpha beta gamma " * 40}, {"text": None}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert next(tokens.hub_texts("org/code")).startswith("alpha") and next(tokens.hub_texts("org/name:part"))
    assert asked == [
        ((f"org/{n}", c), {"split": "train", "streaming": True}) for n, c in (("code", None), ("name", "part"))
    ]
    with pytest.raises(ModelError, match=r"org/name: has no text; expected a field text or content or document"):
        list(tokens.hub_texts("org/name"))
    with pytest.raises(ModelError, match=r"'org/gone': the data set cannot be read \(no such data set\)"):
        next(tokens.hub_texts("org/gone"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModelError, match="pip install datasets"):
        next(tokens.hub_texts("org/name"))


def test_one_run_at_a_time_calibrates(folder: Path, tmp_path: Path) -> None:
    """Two outputs in one place share the statistics of a text, so one run waits for the other; nothing stays locked."""
    options = CompressOptions(calibration=Calibration(ids(), context=16), settings={"effort": "fast"})
    refused: list[OutputError] = []

    def second(stage: str, *_: object) -> None:
        if not refused and stage == "Calibrating":
            with pytest.raises(OutputError, match="another run is calibrating with it .process") as caught:
                seedpack.compress(folder, tmp_path / "b", options)
            refused.append(caught.value)

    seedpack.compress(folder, tmp_path / "a", options, progress=second)
    seedpack.compress(folder, tmp_path / "b", options)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert not list(tmp_path.rglob("lock")) and not list(tmp_path.glob(".*"))
