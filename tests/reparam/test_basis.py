"""Models as combinations of pseudorandom bases: trained, saved, loaded; their scale, their gradients, their refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import seedpack
import seedpack.api
import seedpack.nn as snn
from seedpack.errors import FormatError, KeyNeededError, ModelError, NonfiniteError
from seedpack.formats import Checkpoint
from seedpack.reparam import basis_
from seedpack.reparam.basis import Basis
from tests.helpers.nets import Net, batch, check_saved, trained

SETTINGS: list[dict[str, Any]] = [
    {},
    {"per": "layer", "coef_bits": 6},
    {"block_size": 200, "coef_bits": 16},
    {"generator": "philox", "block_size": 300},
    {"start": "weights", "count": 200},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_trains_and_saves(settings: dict[str, Any], tmp_path: Path) -> None:
    inputs, targets = batch(), torch.randint(0, 5, (4,))
    model: Any = basis_(Net(), **{"count": 50} | settings)
    norms = {"norm.weight", "norm.bias"}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trainable if "seedpack_basis" not in name} == norms
    first, last = trained(model, inputs, targets)
    assert last < 0.4 * first
    loaded = check_saved(model, Net, inputs, tmp_path / "net.safetensors")
    with torch.no_grad():
        again = check_saved(loaded, Net, inputs, tmp_path / "dense.safetensors")
    assert sorted(again.state_dict()) == sorted(Net().state_dict())


def test_the_file_holds_coefficients_alone(tmp_path: Path) -> None:
    model: Any = basis_(Net(), 50, coef_bits=8)
    seedpack.save(model, tmp_path / "net.safetensors")
    with Checkpoint(tmp_path / "net.safetensors") as checkpoint:
        packed = {name for name in checkpoint.manifest.tensors if checkpoint.manifest.is_packed(name)}
        assert packed == {"seedpack_basis"}
        assert len(checkpoint.part("seedpack_basis", "weight").data) == 50
        assert {"conv.weight", "conv.bias", "lstm.bias_hh_l0"} <= checkpoint.manifest.views.keys()
        assert all(error is None for _, error in checkpoint.verify())
    dense = seedpack.load(tmp_path / "net.safetensors", dense=True)
    assert dense.keys() == Net().state_dict().keys()
    seedpack.api.unpack(tmp_path / "net.safetensors", tmp_path / "dense.safetensors")
    from safetensors.torch import load_file

    unpacked = load_file(tmp_path / "dense.safetensors")
    assert all(torch.equal(unpacked[name], dense[name]) for name in dense)


def test_training_goes_on_from_a_file(tmp_path: Path) -> None:
    inputs, targets = batch(), torch.randint(0, 5, (4,))
    model: Any = basis_(Net(), 50)
    trained(model, inputs, targets, 5)
    seedpack.save(model, tmp_path / "net.safetensors")
    torch.manual_seed(0)
    fresh = Net()
    copied = copy.deepcopy(fresh)
    again = seedpack.load(tmp_path / "net.safetensors", model=basis_(fresh, 50)).eval()
    assert torch.equal(again.seedpack_basis, model.seedpack_basis)
    with torch.no_grad():
        assert torch.equal(again(*inputs), model.eval()(*inputs)), "in the scales that the file has"
    by_state: Any = basis_(Net(), 50)
    by_state.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(by_state.eval()(*inputs), model(*inputs)), "so has a state dict"
    with pytest.raises(ModelError, match="'head.bias'"):
        seedpack.load(tmp_path / "net.safetensors", model=basis_(Net(), 50, exclude=["head.bias"]))
    with pytest.raises(ModelError, match="reparametrise it with the same settings"):
        seedpack.load(tmp_path / "net.safetensors", model=basis_(copied, 50, seed=1))


def test_weights_start_at_their_scale() -> None:
    for generator in ("hadamard", "philox"):
        plain: Any = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 100))
        nn.init.zeros_(plain[2].bias)
        made: Any = basis_(copy.deepcopy(plain), 500, generator=generator)
        for before, after in ((plain[0], made[0]), (plain[2], made[2])):
            assert abs(float((after.weight.std() / before.weight.std()).detach()) - 1) < 0.1
        assert abs(float(made[2].bias.std().detach()) / (3 * 200) ** -0.5 - 1) < 0.5


def test_projection_keeps_its_share() -> None:
    plain = nn.Linear(100, 50, bias=False)
    made: Any = basis_(copy.deepcopy(plain), 1000, start="weights")
    error = (made.weight - plain.weight).square().sum() / plain.weight.square().sum()
    assert abs(error.item() - (1 - 1000 / 5000)) < 0.03


def test_gradients_are_those_of_the_weights() -> None:
    model: Any = basis_(nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5)), 40)
    x = torch.randn(7, 30)
    coefs = model.seedpack_basis
    assert isinstance(coefs, nn.Parameter)
    model(x).square().sum().backward()
    epsilon, numeric = 1e-3, torch.zeros_like(coefs)
    with torch.no_grad():
        for m in range(40):
            for sign in (1, -1):
                coefs[0, m] += sign * epsilon
                numeric[0, m] += sign * float(model(x).double().square().sum()) / (2 * epsilon)
                coefs[0, m] -= sign * epsilon
    torch.testing.assert_close(coefs.grad, numeric, rtol=2e-2, atol=0.5)


def test_a_pass_materialises_the_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = basis_(Net(), 50)
    calls = []
    materialise = Basis.materialise
    monkeypatch.setattr(Basis, "materialise", lambda self, coefs: calls.append(1) or materialise(self, coefs))  # type: ignore[func-returns-value]
    model(*batch())
    assert len(calls) == 1
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 3, 8, 8), batch()[1])
    assert model.conv.parametrizations.weight[0].basis._held is None, "nothing is held after an error"


def test_copies_are_apart() -> None:
    model: Any = basis_(Net(), 50)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.seedpack_basis.zero_()
    assert other.conv.weight.abs().max().item() == 0 < model.conv.weight.abs().max().item()
    with torch.no_grad():
        assert torch.equal(other.eval()(*batch())[0], other(*batch())[1]), "its own, in a forward pass too"
    state = model.state_dict()
    assert sum("basis" in name for name in state) == 1
    other.load_state_dict(state)
    assert torch.equal(other.conv.weight, model.conv.weight)


def test_chosen_by_name(tmp_path: Path) -> None:
    inputs = batch()
    model: Any = basis_(Net(), 30, include=["head.*", "conv.weight"], exclude=["head.bias"])
    views = {"head.weight", "conv.weight"}
    seedpack.save(model.eval(), tmp_path / "net.safetensors")
    with Checkpoint(tmp_path / "net.safetensors") as checkpoint:
        assert checkpoint.manifest.views.keys() == views
    check_saved(model, Net, inputs, tmp_path / "other.safetensors")


def test_a_private_key_is_needed(tmp_path: Path) -> None:
    inputs, key, file = batch(), bytes(range(16)), tmp_path / "net.safetensors"
    model: Any = basis_(Net(), 50, key=key).eval()
    with torch.no_grad():
        expected = model(*inputs)
    seedpack.save(model, file)
    assert key not in file.read_bytes() and key.hex().encode() not in file.read_bytes()
    assert model.conv.parametrizations.weight[0].basis.codec.seed > 0, "not the words of another model"
    for given, message in ((None, "none is given"), (bytes(16), "the key given is another one")):
        with pytest.raises(KeyNeededError, match=message):
            seedpack.load(file, model=Net(), key=given)
    loaded = seedpack.load(file, model=Net(), key=key).eval()
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), expected)


def test_a_cut_off_file_gives_a_smaller_model(tmp_path: Path) -> None:
    inputs, targets = batch(), torch.randint(0, 5, (4,))
    model, file = basis_(Net(), 64, coef_bits=8, levels=4), tmp_path / "net.safetensors"
    trained(model, inputs, targets, 200)
    seedpack.save(model, file)
    data = file.read_bytes()
    losses = []
    with torch.no_grad():
        for quarter in (1, 2, 3, 4):
            (tmp_path / "cut").write_bytes(data[: len(data) - 64 + 16 * quarter])
            cut = seedpack.load(tmp_path / "cut", model=Net(), fraction=1.0).eval()
            asked = seedpack.load(file, model=Net(), fraction=quarter / 4).eval()
            assert torch.equal(cut(*inputs), asked(*inputs))
            losses.append(float(nn.functional.cross_entropy(cut(*inputs), targets)))
        assert torch.equal(cut(*inputs), model(*inputs))
        start = float(nn.functional.cross_entropy(Net().eval()(*inputs), targets))
    assert max(losses) < start and losses[3] < 0.3 * start
    (tmp_path / "cut").write_bytes(data[: len(data) - 60])
    with pytest.raises(
        FormatError, match=r"cut off before the first level of tensor 'seedpack_basis' ends; fetch more"
    ):
        seedpack.load(tmp_path / "cut", model=Net(), fraction=0.25)
    (tmp_path / "cut").write_bytes(data[:-1])
    with pytest.raises(FormatError, match="truncated"):
        seedpack.load(tmp_path / "cut", model=Net())
    with pytest.raises(FormatError, match="fraction must be above 0 and at most 1"):
        seedpack.load(file, model=Net(), fraction=1.5)


def test_checkpointing_makes_the_same_weights_again() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.recompute = nn.Linear(6, 8), nn.Linear(8, 3), False

        def inner(self, x: torch.Tensor) -> Any:
            return self.second(self.first(x).tanh())

        def forward(self, x: torch.Tensor) -> Any:
            from torch.utils.checkpoint import checkpoint

            return checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x)

    model: Any = basis_(Checkpointed(), 64, levels=8)
    x, found = torch.randn(5, 6), []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        torch.manual_seed(3)
        model(x).square().sum().backward()
        found.append(model.seedpack_basis.grad.clone())
    torch.testing.assert_close(found[0], found[1])


def test_nested_training_can_be_turned_off() -> None:
    model: Any = basis_(nn.Linear(6, 8), 64, levels=8)
    x = torch.randn(5, 6)
    with torch.no_grad():
        whole = model.eval()(x)
        assert any(not torch.equal(model.train()(x), whole) for _ in range(9))
        model.parametrizations.weight[0].basis.nested = False
        assert all(torch.equal(model.train()(x), whole) for _ in range(9))


def test_holders_of_every_kind(tmp_path: Path) -> None:
    shared = nn.Linear(4, 4)
    twice: Any = basis_(nn.Sequential(shared, nn.ReLU(), shared), 10, per="layer").eval()

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reparametrizations = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.reparametrizations(x)

    def sequence() -> nn.Module:
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, nn.ReLU(), layer)

    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(3, 4)
    check_saved(twice, sequence, (x,), tmp_path / "a")
    check_saved(basis_(Odd(), 10).eval(), Odd, (x,), tmp_path / "b")
    check_saved(
        basis_(encoder, 300).eval(), lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        (torch.randn(2, 5, 16),), tmp_path / "c",
    )  # fmt: skip


def test_what_is_not_trained_is_left_alone() -> None:
    net: Any = nn.Sequential(nn.Linear(4, 4), nn.InstanceNorm1d(4, affine=True), snn.Linear(4, 4, 3))
    net[0].weight.requires_grad_(False)
    kept = net[0].weight.clone()
    model: Any = basis_(net, 10)
    assert torch.equal(model[0].weight, kept) and torch.equal(model[1].weight, torch.ones(4))
    assert {name for name, p in model.named_parameters()} == {
        "seedpack_basis", "0.weight", "1.weight", "1.bias", "2.coefs", "2.bias",
    }  # fmt: skip


def test_weights_do_not_depend_on_autocast() -> None:
    for generator in ("hadamard", "philox"):
        model: Any = basis_(nn.Linear(30, 20), 40, generator=generator)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = model.weight
        with torch.no_grad():
            assert torch.equal(found, model.weight)


def test_copies_after_a_pass_of_a_recurrent_layer() -> None:
    model: Any = basis_(Net(), 50)
    model(*batch()).sum().backward()
    other = copy.deepcopy(model)
    inputs = batch()
    assert torch.equal(other.eval()(*inputs), model.eval()(*inputs))


def test_coefficients_that_no_file_holds(tmp_path: Path) -> None:
    for bits, value in ((32, float("nan")), (16, 1e5), (8, float("inf"))):
        model: Any = basis_(Net(), 50, coef_bits=bits)
        file = tmp_path / "net.safetensors"
        with torch.no_grad():
            model.seedpack_basis[0, 3] = value
        with pytest.raises(NonfiniteError, match=f"cannot be stored in {bits} bits"):
            seedpack.save(model, file)
        assert not file.exists()


def test_refusals() -> None:
    with pytest.raises(ModelError, match="pattern 'nothing' matches no parameter; names look like"):
        basis_(Net(), 5, include=["nothing"])
    with pytest.raises(ModelError, match="no parameter to reparametrise"):
        basis_(Net(), 5, include=["head.*"], exclude=["head.*"])
    with pytest.raises(ModelError, match="has a basis already"):
        basis_(basis_(Net(), 5, include=["head.*"]), 5, include=["conv.*"])
    with pytest.raises(ModelError, match="parametrised already"):
        basis_(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), 5)
    with pytest.raises(ModelError, match="block_size must be a whole number"):
        basis_(Net(), 5, block_size=0)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    for exclude in ([], ["1.*"], ["0.*"]):
        with pytest.raises(ModelError, match=r"'0.weight' and '1.weight' are one parameter; tied weights cannot be"):
            basis_(tied, 5, exclude=exclude)
    with pytest.raises(ModelError, match=r"layer of seedpack.nn, which is trained as coefficients already"):
        basis_(nn.Sequential(snn.Linear(3, 3, 2)), 5, include=["0.coefs"])
    with pytest.raises(ModelError, match="sparse gradients"):
        basis_(nn.Embedding(3, 3, sparse=True), 5)
    broken = nn.Linear(3, 3)
    nn.init.constant_(broken.bias, float("nan"))
    with pytest.raises(ModelError, match="'bias' holds NaN or Inf"):
        basis_(broken, 5)


def test_transformers_trainer(tmp_path: Path) -> None:
    """Nothing changes in a training loop of others."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip

    def fresh() -> Any:
        return transformers.AutoModelForCausalLM.from_config(config)

    model: Any = basis_(fresh(), 400)
    ids = torch.randint(0, 64, (4, 16))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    with torch.no_grad():
        before = float(model(input_ids=ids, labels=ids).loss)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=80, learning_rate=1e-2, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    model.eval()
    with torch.no_grad():
        after = model(input_ids=ids, labels=ids)
        assert float(after.loss) < 0.7 * before
        seedpack.save(model, tmp_path / "model.safetensors")
        loaded = seedpack.load(tmp_path / "model.safetensors", model=fresh()).eval()
        assert torch.equal(loaded(input_ids=ids).logits, after.logits)
