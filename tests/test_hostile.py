"""Files and models made to mislead: one clear error of seedpack's own, soon, and nothing lost."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import seedpack
from seedpack.api import unpack
from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.codecs.svd import SVDCodec
from seedpack.errors import CodecError, FormatError, LimitError, ModelError, OutputError, SeedpackError, VersionError
from seedpack.eval.tensors import compare_tensors
from seedpack.formats import Checkpoint
from seedpack.formats.listing import list_safetensors, natural_key
from seedpack.formats.manifest import _document_digest
from seedpack.hf.quantization import block_sizes
from seedpack.loader.layers import pack_module_
from tests.helpers import checkpoints as make
from tests.helpers.bombs import write_tensors
from tests.helpers.models import Folders, llama

CODEC = SeedLMCodec(10, 8, 3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make.write(tmp_path / "a.safetensors")


def load_all(path: Path) -> None:
    seedpack.load(path, dense=True)


@pytest.mark.parametrize(
    "header",
    [
        '{"x":{"dtype":"F32","shape":%s,"data_offsets":[0,4]}}' % ([2**62] * 50_000),
        "{" + ",".join(f'"{i}":1' for i in range(100_000)) + ',"0":1}',
        "{" + '"a":[' * 50_000 + "]" * 50_000 + "}",
    ],
    ids=["axes", "duplicates", "nesting"],
)
def test_headers_that_take_long_to_refuse(tmp_path: Path, header: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(make.join(header, b"1234"))
    started = time.perf_counter()
    with pytest.raises(FormatError) as caught:
        Checkpoint(tmp_path / "x.safetensors")
    assert time.perf_counter() - started < 5
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["__metadata__", "a\ud800"])
def test_names_that_no_file_can_hold(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="not a valid tensor name"):
        seedpack.compress({name: torch.ones(3), "a.weight": torch.randn(8, 8)}, tmp_path / "x", codec=CODEC)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"rank": 1, "factors": {"id": "seedlm", "version": 0, "config": []}}, CodecError),
        ({"rank": 1, "factors": {"id": ["seedlm"], "version": 0, "config": {}}}, CodecError),
        ({"rank": 1, "factors": {"id": "svd", "version": 0, "config": {}}}, CodecError),
        ({"rank": 2**31}, CodecError),
        ({"rank": "1"}, SeedpackError),
    ],
)
def test_forged_svd_settings(file: Path, config: dict[str, Any], kind: type[Exception]) -> None:
    whole = {**SVDCodec(rank=1).spec().config, **config}

    def forge(manifest: dict[str, Any]) -> None:
        spec = next(c for c in manifest["codecs"] if c["id"] == "seedlm")
        spec.update(id="svd", version=0, config=whole)

    make.edit_manifest(file, forge)
    with pytest.raises(kind, match=r"a.weight"):
        load_all(file)


def test_codecs_in_codecs_in_codecs(file: Path) -> None:
    """Each level would be built twice, so that some of them take seconds and more of them hours."""
    spec = SVDCodec(rank=1).spec().to_json()
    for _ in range(14):
        stack = {"matrix_rows": 1, "matrix_columns": 1, "of": spec, "transposed": False}
        spec = SVDCodec(rank=1).spec().to_json()
        spec["config"]["factors"] = {"id": "stack", "version": 0, "config": stack}
    make.edit_manifest(file, lambda m: next(c for c in m["codecs"] if c["id"] == "seedlm").update(spec))
    started = time.perf_counter()
    with pytest.raises(CodecError, match="factors cannot be stack"):
        load_all(file)
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("of", [{"id": [], "version": 0, "config": {}}, {"id": "a", "version": 0, "config": [1]}, "x"])
def test_labels_of_forged_stacks(file: Path, of: object) -> None:
    make.edit_manifest(file, lambda m: next(c for c in m["codecs"] if c["id"] == "seedlm")["config"].update(of=of))
    assert [tensor.codec for tensor in list_safetensors(file).tensors] == ["seedlm", ""]


def test_numbers_of_any_length_are_sorted() -> None:
    names = ["a10", "a9", "a" + "9" * 5000, "a", "b\u0661", "9"]
    assert sorted(names, key=natural_key) == ["9", "a", "a9", "a10", "a" + "9" * 5000, "b\u0661"]


@pytest.mark.parametrize("bits", [0x7C00, 0x7E00], ids=["Inf", "NaN"])
def test_factors_that_are_not_finite(tmp_path: Path, bits: int) -> None:
    codec = SVDCodec(rank=2)
    parts = codec.encode(torch.randn(8, 8))
    parts["right"][1, 3] = bits
    path = write_tensors(tmp_path / "a", {"w": (codec, (8, 8), parts)})
    with pytest.raises(CodecError, match="'w': svd: a factor is NaN or Inf; the file is corrupt"):
        load_all(path)


def test_shards_whose_names_no_file_has(tmp_path: Path) -> None:
    for name in ("é" * 200, "..", ".", "a\0b", "/etc/passwd", "../a.safetensors", "\udcff"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(FormatError, match="names the shard"):
            Checkpoint(tmp_path)


def test_quantisations_of_other_forms() -> None:
    assert block_sizes(["fp8", 3, {"weight_block_size": [4, 8]}]) == [(4, 8)]


def test_raw_is_checked_like_any_codec(file: Path) -> None:
    def raw(manifest: dict[str, Any]) -> Any:
        return next(c for c in manifest["codecs"] if c["id"] == "raw")

    data = file.read_bytes()
    make.edit_manifest(file, lambda m: raw(m).update(version=9))
    with pytest.raises(VersionError, match="version 9"):
        load_all(file)
    file.write_bytes(data)
    make.edit_manifest(file, lambda m: raw(m).update(config={"junk": 1}))
    with pytest.raises(CodecError, match="missing or unknown"):
        load_all(file)


@pytest.mark.parametrize("codec", [SeedLMCodec(9, 8, 3), SeedLMCodec(12, 8, 3), SeedLMCodec(16, 8, 3)], ids=str)
def test_seed_zero_is_refused_at_every_width(codec: SeedLMCodec) -> None:
    parts = codec.encode(torch.randn(3, 40))
    codec.check(parts, (3, 40))
    parts["weight"].zero_()
    with pytest.raises(CodecError, match="a seed is 0"):
        codec.check(parts, (3, 40))


def test_a_few_bytes_that_stand_for_terabytes(file: Path, tmp_path: Path) -> None:
    weight = torch.randn(1 << 17, 1) @ torch.randn(1, 64)
    codec = SVDCodec(rank=1)
    parts = codec.encode(weight)
    parts["right"] = parts["right"].repeat(1, 1 << 14)
    shape = (1 << 17, 1 << 20)
    from seedpack.dtypes import to_bytes
    from seedpack.formats import CheckpointWriter, PlannedTensor

    planned = PlannedTensor("w.weight", codec.spec(), "F32", shape, codec.parts(shape))
    with CheckpointWriter(tmp_path / "bomb", [planned], {}, "test") as writer:
        writer.write("w.weight", {name: to_bytes(part) for name, part in parts.items()})
    with pytest.raises(LimitError, match=r"'w.weight' would take 1099.5 GB decoded, more than the limit of 2.4 GB"):
        load_all(tmp_path / "bomb")


def test_transposed_matrices_of_a_bare_state_dict(tmp_path: Path) -> None:
    """A Conv1D's square matrix packed by name alone: the layer gets the weight the right way round."""
    from transformers.pytorch_utils import Conv1D

    source = Conv1D(16, 16)
    nn.init.normal_(source.weight)
    seedpack.compress(source.state_dict(), tmp_path / "a", codec=CODEC)
    loaded = seedpack.load(tmp_path / "a", model=Conv1D(16, 16))
    dense = seedpack.load(tmp_path / "a", dense=True)
    x = torch.randn(3, 16)
    torch.testing.assert_close(loaded(x), x @ dense["weight"] + source.bias)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(llama(tie_word_embeddings=False), tmp_path_factory.mktemp("llama"), shard_bytes=6000)


def changed(folders: Folders, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    shutil.copytree(folders.packed, tmp_path / "copy")
    return tmp_path / "copy", json.loads((tmp_path / "copy" / "config.json").read_text())


def test_config_and_files_must_agree(folders: Folders, tmp_path: Path) -> None:
    path, config = changed(folders, tmp_path)
    document = config["quantization_config"]
    document["codecs"][0]["config"]["exponents"] = 3
    body = {k: v for k, v in document.items() if k not in ("digest", "quant_method", "bits")}
    document["digest"] = _document_digest(body)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="quantization_config is not that of the weight files"):
        seedpack.load(path)


def test_a_lost_shard(folders: Folders, tmp_path: Path) -> None:
    path, _ = changed(folders, tmp_path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    last = max(index["weight_map"].values())
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if name != last}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / last).unlink()
    with pytest.raises(FormatError):
        seedpack.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": [5]},
        {"architectures": ["pipeline"]},
        {"architectures": 5},
        {"hidden_size": "abc"},
        {"num_attention_heads": 0},
        {"vocab_size": -4},
        {"model_type": []},
        {"dtype": "nope"},
        {"quantization_config": None},
        {"quantization_config": "seedpack"},
        {"quantization_config": {"quant_method": "seedpack", "self": 1}},
    ],
    ids=str,
)
def test_odd_configs(folders: Folders, tmp_path: Path, change: dict[str, Any]) -> None:
    path, config = changed(folders, tmp_path)
    (path / "config.json").write_text(json.dumps({**config, **change}))
    try:
        model = seedpack.load(path)
    except SeedpackError:
        pass
    else:  # what the folder says elsewhere was enough
        assert type(model).__name__.startswith("Llama")
    dense = tmp_path / "dense"
    shutil.copytree(folders.dense, dense)
    (dense / "config.json").write_text(json.dumps({**json.loads((dense / "config.json").read_text()), **change}))
    try:
        seedpack.compress(dense, tmp_path / "out", codec="svd", settings={"rank": 1})
    except SeedpackError:
        assert not (tmp_path / "out").exists()


def test_configs_of_many_layers(folders: Folders, tmp_path: Path) -> None:
    """transformers would build them one by one, for hours."""
    path, config = changed(folders, tmp_path)
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    started = time.perf_counter()
    with pytest.raises(ModelError, match="num_hidden_layers is 1000000, but the weights are"):
        seedpack.load(path)
    shutil.copytree(folders.dense, tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "quantization_config": None, "n_layer": 500}))
    with pytest.raises(ModelError, match="n_layer is 500"):
        seedpack.compress(tmp_path / "dense", tmp_path / "out")
    assert time.perf_counter() - started < 2


def test_links_out_of_a_folder(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "ab").write_text("{}")
    for kind in ("dense", "packed"):
        path = shutil.copytree(getattr(folders, kind), tmp_path / kind)
        (path / "tokenizer.json").symlink_to(tmp_path / "blobs" / "ab")  # as the hub's cache has it
        (path / "same.json").symlink_to("config.json")
        (path / "vocab.json").symlink_to(tmp_path / "id_rsa")
        make_other = seedpack.unpack if kind == "packed" else seedpack.compress
        with pytest.raises(ModelError, match="vocab.json: is a link out of the folder"):
            make_other(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (path / "vocab.json").unlink()
        make_other(path, tmp_path / f"{kind}-out")
        assert (tmp_path / f"{kind}-out" / "tokenizer.json").read_text() == "{}"


def test_force_spares_what_is_not_its_own(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    torch.save({"w.weight": torch.randn(8, 8)}, home / "net.pt")
    (home / "thesis.tex").write_text("precious")
    for output in (home, tmp_path):
        with pytest.raises((ModelError, OutputError)):
            seedpack.compress(home / "net.pt", output, codec=CODEC, force=True)
    with pytest.raises(OutputError, match="is a folder, but the output is a file"):
        (tmp_path / "results").mkdir()
        seedpack.compress(home / "net.pt", tmp_path / "results", codec=CODEC, force=True)
    seedpack.compress(home / "net.pt", home / "packed", codec=CODEC)
    with pytest.raises(ModelError, match="is the model itself"):
        unpack(home / "packed", home / "packed", force=True)
    assert sorted(p.name for p in home.iterdir()) == ["net.pt", "packed", "thesis.tex"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(4).to_sparse(),
        torch.empty(4, 4, device="meta"),
        torch.zeros(1).expand(1 << 15, 1 << 15),
    ],
    ids=["sparse", "meta", "expanded"],
)
def test_tensors_that_are_no_plain_arrays(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="tensor 'w.weight': is"):
        seedpack.compress({"w.weight": tensor}, tmp_path / "x", codec=CODEC)


@pytest.mark.parametrize("pickled", ["8002852e", "8002282e", "8002732e", "80025d2e"])
def test_broken_pickles(tmp_path: Path, pickled: str) -> None:
    (tmp_path / "x.pt").write_bytes(bytes.fromhex(pickled))
    with pytest.raises(ModelError, match=r"x.pt: "):
        seedpack.compress(tmp_path / "x.pt", tmp_path / "out")


def test_huge_values(tmp_path: Path) -> None:
    state = {"w.weight": torch.full((8, 8), 1e300, dtype=torch.float64), "v.weight": torch.full((8, 8), 3e38)}
    with pytest.raises(SeedpackError, match=r"NaN or Inf \(or more than 1e33\) in 2 tensors"):
        seedpack.compress(state, tmp_path / "x", codec=CODEC)
    with pytest.raises(CodecError, match="do not fit float16"):
        seedpack.compress({"w.weight": 1e12 * torch.randn(8, 8)}, tmp_path / "x", codec="svd", settings={"rank": 2})


def test_comparing_what_is_not_finite_or_zero(tmp_path: Path) -> None:
    state = {"a.weight": torch.zeros(8, 8), "b.weight": torch.randn(8, 8)}
    state["b.weight"][0, 0] = torch.nan
    seedpack.compress(state, tmp_path / "x.safetensors", codec="svd", settings={"rank": 2}, allow_nonfinite=True)
    torch.save(state, tmp_path / "a.pt")
    _, count, comparisons = compare_tensors(tmp_path / "a.pt", tmp_path / "x.safetensors")
    assert count == len(list(comparisons)) == 2


def test_terminal_escapes_do_not_reach_the_terminal(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from seedpack.cli.main import cli

    seedpack.compress({"a\x1b[2J.weight": torch.randn(8, 8), "[bold]b": torch.ones(2)}, tmp_path / "x", codec=CODEC)
    text = CliRunner().invoke(cli, ["inspect", str(tmp_path / "x")]).output
    assert "\x1b[2J" not in text and "[bold]b" in text


def test_embedding_lookups_at_the_edges() -> None:
    layer = nn.Embedding(10, 16)
    packed = pack_module_(layer, CODEC, CODEC.encode(layer.weight.detach()))
    assert packed(torch.empty(0, dtype=torch.long)).shape == (0, 16)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            packed(torch.tensor([index]))


def test_tiny_blocks_are_fitted_soon() -> None:
    """Blocks far below the tensor's largest have no coefficient but zero: no search."""
    weight = torch.randn(512, 64) * 1e-7
    weight[0] = torch.randn(64)
    codec = SeedLMCodec()
    codec.encode(torch.randn(8, 64))
    started = time.perf_counter()
    decoded = codec.decode(codec.encode(weight), (512, 64), torch.float32)
    assert time.perf_counter() - started < 10
    assert float((decoded[0] - weight[0]).norm() / weight[0].norm()) < 0.2
