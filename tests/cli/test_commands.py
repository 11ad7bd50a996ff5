"""The program as a user meets it: real processes for exit codes and streams, click's runner for the rest."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import seedpack
from seedpack.cli import output
from seedpack.cli.main import COMMANDS, cli
from seedpack.cli.output import db, duration, parse_size, size
from seedpack.codecs import names
from seedpack.codecs.registry import codec_ids
from seedpack.converter.plan import codec_for
from tests.helpers.models import CODEC, Folders, llama
from tests.helpers.nets import OddNet

SET = ["--codec=seedlm", *(f"--set={key}={value}" for key, value in CODEC.spec().config.items())]


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.save(OddNet().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.fixture
def packed(model: Path) -> Path:
    run("compress", model, "-o", model.parent / "net.safetensors", *SET)
    return model.parent / "net.safetensors"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    text = run(command, "--help").output
    assert "Usage:" in text and len(text.splitlines()) > 5
    assert command in run("--help").output
    examples = [line.split() for line in text.partition("Examples:\n")[2].splitlines()]
    assert examples and all(words[:2] == ["seedpack", command] for words in examples)
    for words in examples:
        options = {word for word in words if word.startswith("-")}
        known = text if command != "image" else run(command, words[2], "--help").output
        assert all(f"{option} " in known or f"{option}," in known for option in options), words


def test_shells_complete_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        environment = {**os.environ, "COMP_WORDS": f"seedpack {words}", "COMP_CWORD": str(len(words.split()))}
        command = [Path(sys.executable).parent / "seedpack"]
        environment |= {"_SEEDPACK_COMPLETE": "bash_complete"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    assert completed("comp") == ["plain,compress", "plain,compare"]
    assert "plain,--calibration" in completed("compress --cal")


def test_version() -> None:
    assert seedpack.__version__ in run("--version").output == run("-V").output


def test_compress_prints_a_summary(model: Path) -> None:
    text = run("compress", model, "-o", model.parent / "a", *SET).output
    words = (
        "× smaller",
        "5 of 10 tensors packed",
        "over the packed weights",
        "of the weights' energy",
        "weights/s",
        "next: ",
    )
    for word in words:
        assert word in text
    again = run("compress", model, "-o", model.parent / "a", *SET, code=1).output
    assert "exists already; pass --force" in again and "Traceback" not in again
    run("compress", model, "-o", model.parent / "a", *SET, "--force")


def test_trellis_is_the_default(model: Path) -> None:
    report = json.loads(run("compress", model, "-o", model.parent / "a", "--effort", "fast", "--json").stdout)
    codecs = [tensor["codec"] for tensor in report["tensors_packed"].values()]
    assert all(codec["id"] == "trellis" and codec["config"]["effort"] == "fast" for codec in codecs)
    assert {codec["config"]["code_bits"] for codec in codecs} == {4}
    assert report["error_db"] < -17


def test_fractions_are_a_budget(model: Path) -> None:
    budget = 6.3
    text = run("compress", model, "--dry-run", "--bits", budget).output
    document = json.loads(run("compress", model, "--dry-run", "--bits", budget, "--json").stdout)
    bits = {t["config"]["code_bits"] for t in document["tensors"].values() if t["codec"] == "trellis"}
    assert len(bits) > 1 and all(f"trellis {k}" in text for k in bits)


def test_dry_run_and_plan_file(model: Path) -> None:
    text = run("compress", model, "--dry-run", *SET).output
    assert "fc.weight" in text and "33×20" in text and "tensors raw: no matrix" in text
    plan = json.loads(run("compress", model, "--dry-run", "--json", *SET).stdout)
    plan["tensors"]["fc.weight"] = {"codec": "raw", "config": {"dtype": "F32"}}
    (model.parent / "plan.json").write_text(json.dumps(plan))
    report = json.loads(
        run("compress", model, "-o", model.parent / "a", "--json", *SET, "--plan", model.parent / "plan.json").stdout
    )
    assert report["packed_tensors"] == 4 and "fc.weight" not in report["tensors_packed"]
    assert not list(model.parent.glob("b*"))


def test_measured_plans_are_what_compress_follows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama(max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    calibrated = ["--bits", 3.4, "--effort", "fast", "--calibration", "self", "--calibration-tokens", 1024, "--json"]
    calibrated.append("--no-measure")
    arguments = ["compress", tmp_path / "dense", "-o", tmp_path / "out", *calibrated]
    plan = json.loads(run(*arguments, "--dry-run").stdout)
    assert not (tmp_path / "out").exists() and (tmp_path / "seedpack-calibration").is_dir()
    (tmp_path / "plan.json").write_text(json.dumps(plan))

    def bits(*more: object) -> dict[str, float]:
        report = json.loads(run(*arguments, "--force", *more).stdout)
        return {name: t["codec"]["config"]["code_bits"] for name, t in report["tensors_packed"].items()}

    chosen = {n: t["config"]["code_bits"] for n, t in plan["tensors"].items() if t["codec"] == "trellis"}
    assert len(set(chosen.values())) > 1 and bits() == chosen
    first = next(iter(chosen))
    plan["tensors"][first]["config"]["code_bits"] = 7
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert bits("--plan", tmp_path / "plan.json") == chosen | {first: 7}


def test_options_reach_the_library(model: Path) -> None:
    report = json.loads(
        run("compress", model, "-o", model.parent / "a", "--codec", "svd+seedlm", "--bits", 6, "--include", "fc*",
            "--include", "out*", "--exclude", "out.weight", "--dtype", "bfloat16", "--json").stdout
    )  # fmt: skip
    assert list(report["tensors_packed"]) == ["fc.weight"]
    assert report["tensors_packed"]["fc.weight"]["codec"]["config"]["factors"]["id"] == "seedlm"
    dense = seedpack.load(model.parent / "a", dense=True)
    assert dense["norm.weight"].dtype == torch.bfloat16 == dense["fc.weight"].dtype


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compress", "MODEL", "-o", "x.pt"], 1, "what is written is safetensors; name it x.safetensors"),
        (["compress", "MODEL", "-o", "x", "--set", "rank"], 2, "'rank' is not KEY=VALUE"),
        (["compress", "MODEL", "-o", "x", "--codec", "seedlm", "--bits", "5"], 2, "configurations for 3 and 4"),
        (["compress", "MODEL", "-o", "x", "--bits", "9"], 2, "9.0 bits: must be from 1 to 8"),
        (["compress", "MODEL", "-o", "x", "--bits", "nan"], 2, "nan bits: must be from 1 to 8"),
        (["compress", "MODEL", "-o", "x", "--bits", "1.2"], 1, "the cheapest plan takes"),
        (["compress", "MODEL", "-o", "x", "--effort", "most"], 2, "effort must be one of fast, default, best"),
        (["compress", "MODEL", "-o", "x", "--codec", "seedlm", "--effort", "best"], 2, "has no setting 'effort'"),
        (
            ["compress", "MODEL", "-o", "x", "--codec", "zip"],
            2,
            "unknown codec 'zip'; known: basis, field, mask, raw, seedlm, stack, svd, trellis",
        ),
        (["compress", "MODEL", "-o", "x", "--exclude", "zzz*"], 1, "pattern 'zzz*' matches no tensor"),
        (["compress", "MODEL", "-o", "x", "--dtype", "int3"], 2, "dtype 'int3': choose float32, float16"),
        (["compress", "MODEL", "-o", "x", "--shard-size", "many"], 2, "not a valid size: 'many'"),
        (["compress", "MODEL", "-o", "x", "--shard-size", "1GB"], 1, "only a Hugging Face folder is split"),
        (["compress", "MODEL", "-o", "x", "--include", "*bias"], 1, "nothing that --include asks for can be packed"),
        (
            ["compress", "MODEL", "-o", "x", "--codec", "svd", "--bits", "4", "--set", "rank=2"],
            2,
            "rank or bits, not both",
        ),
        (["compress", "MODEL", "-o", "x", "--codec", "svd+"], 2, "unknown codec ''"),
        (["compress", "MODEL", "-o", "MODEL", "--force"], 1, "what is written is safetensors"),
        (["compress", "nothing.pt", "-o", "x"], 1, "no such file or folder"),
        (["compress", "MODEL", "-o", "x", "--bits", "4", "--target-size", "1MB"], 2, "bits or a target size, not both"),
        (["compress", "MODEL", "-o", "x", "--device", "tpu"], 2, "fitting runs on cpu, cuda, or cuda:N"),
        (["inspect", "MODEL", "--tensors", "fcc*"], 1, "'fcc*' matches no tensor; names look like 'fc.bias'"),
        (["verify", "MODEL"], 1, "net.pt is a torch checkpoint, not a packed checkpoint; run seedpack compress"),
        (["--quiet", "--verbose", "codecs"], 2, "exclude each other"),
        (["unpack", "MODEL", "-o", "x"], 1, "net.pt is a torch checkpoint"),
        (["verify", "nothing"], 1, "no such file or folder"),
        (["load", "nothing"], 1, "no such file or folder"),
        (["unpack", "nothing", "-o", "x"], 1, "no such file or folder"),
        (["compare", "MODEL", "nothing"], 1, "no such file or folder"),
        (["comprss"], 2, "Did you mean 'compress'?"),
        (["eval", "MODEL", "MODEL", "--text", "nothing"], 2, "does not exist"),
    ],
)
def test_mistakes_get_one_clear_line(
    model: Path, arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    result = run(*(model if a == "MODEL" else a for a in arguments), code=code)
    assert isinstance(result.exception, SystemExit), "no error but seedpack's own"
    assert message in result.stderr and "Traceback" not in result.stderr
    assert sorted(p.name for p in model.parent.iterdir()) == ["net.pt"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["verify", "net.pt"], 1, "net.pt is a torch checkpoint, not a packed checkpoint"),
        (["compress", "net.pt", "-o", "x", "--bits", "99"], 2, "99.0 bits: must be from 1 to 8"),
        (["comprss"], 2, "Did you mean 'compress'?"),
    ],
)
def test_exit_codes_of_the_program(model: Path, arguments: list[str], code: int, message: str) -> None:
    command = [sys.executable, "-m", "seedpack", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=model.parent, env=environment)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in model.parent.iterdir()) == ["net.pt"]


def test_verify_names_the_damaged_tensor(packed: Path) -> None:
    assert "all 10 tensors match" in run("verify", packed).output
    document = json.loads(run("inspect", packed, "--json").stdout)
    data = bytearray(packed.read_bytes())
    data[-1] ^= 4
    packed.write_bytes(data)
    last = max(document["tensors"], key=lambda t: (t["parts"]["weight"]["dtype"] == "U8", t["name"]))["name"]
    text = run("verify", packed, code=1).output
    assert "1 of 10 tensors are damaged" in text and f"tensor {last!r}" in text
    bad = json.loads(run("verify", packed, "--json", code=1).stdout)["bad"]
    assert [entry["tensor"] for entry in bad] == [last]


def test_unpack(packed: Path) -> None:
    run("unpack", packed, "-o", packed.parent / "dense.safetensors", "--dtype", "float16")
    dense = load_file(packed.parent / "dense.safetensors")
    expected = seedpack.load(packed, dense=True)
    assert all(torch.equal(dense[n], t.half()) for n, t in expected.items())


def test_compare(model: Path, packed: Path) -> None:
    text = run("compare", model, packed).output
    assert "fc.weight" in text and "5 equal" in text and "dB" in text
    document = json.loads(run("compare", model, packed, "--json").stdout)
    by_name = {t["name"]: t for t in document["tensors"]}
    assert by_name["fc.bias"]["error"] == 0 and by_name["fc.weight"]["error_db"] == pytest.approx(
        document["error_db"], abs=2
    )
    assert 1 < by_name["fc.weight"]["rank_a"] <= 20
    run("compress", model, "-o", packed.parent / "svd", "--codec", "svd", "--set", "rank=5")
    svd = {t["name"]: t for t in json.loads(run("compare", model, packed.parent / "svd", "--json").stdout)["tensors"]}
    assert svd["fc.weight"]["rank"] == 5 and svd["fc.weight"]["captured"] <= svd["fc.weight"]["optimal"] + 1e-6
    assert svd["fc.weight"]["captured"] > 0.98 * svd["fc.weight"]["optimal"]
    assert json.loads(run("compare", model, model, "--json").stdout)["error_db"] is None


def test_load_of_a_file(packed: Path) -> None:
    assert "10, " in run("load", packed).output
    assert json.loads(run("load", packed, "--json").stdout)["tensors"] == 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (path / "dense").mkdir()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(
        path / "dense"
    )
    return Folders(llama(), path)


def test_load_of_a_folder(folders: Folders) -> None:
    text = run("load", folders.packed).output
    assert "LlamaForCausalLM" in text and "15 PackedLinear" in text
    report = json.loads(run("load", folders.packed, "--json").stdout)
    assert (
        report["layers"] == {"PackedEmbedding": 1, "PackedLinear": 15}
        and report["memory_bytes"] < report["dense_bytes"]
    )


def test_formats_for_people() -> None:
    assert [size(n) for n in (12, 1234, 5.5e7, 2e9)] == ["12 B", "1.2 kB", "55.0 MB", "2.0 GB"]
    assert [parse_size(t) for t in ("5GB", "200 mb", "77", "1.5kB")] == [5 * 10**9, 2 * 10**8, 77, 1500]
    assert [duration(s) for s in (0.25, 75)] == ["0.2s", "1m15s"] and db(float("-inf")) == "exact"


def test_progress_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("seedpack.cli.output.time.perf_counter", lambda: now)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    with output.progress("Fitting", 100, "weights") as advance:
        now = 1000.0  # of compiling, which is no work
        advance("a", 0)
        advance("a", 20)
        now = 1040.0
        advance("b", 30)
    assert (
        capsys.readouterr().err == "Fitting: 20%, 0.0 weights/s, 1h06m left\nFitting: 50%, 0.8 weights/s, 1m06s left\n"
    )


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(__import__("io").StringIO):  # type: ignore[misc]
        def isatty(self) -> bool:
            return True

    stream: Any = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with output.progress("Fitting", 100, "weights") as advance:
        advance("layer.weight", 50)
    assert "Fitting" in stream.getvalue()


def test_levels_and_private_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextvars import ContextVar

    from seedpack import keys

    monkeypatch.setattr(keys, "_in_use", ContextVar("in_use", default=frozenset()))
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": torch.randn(40, 50), "fc.bias": torch.randn(40)}, "net.pt")
    Path("my.key").write_bytes(bytes(range(16)))
    Path("other.key").write_bytes(bytes(16))
    settings = ("--codec", "basis", "--bits", "4", "--set", "coef_bits=8", "--set", "levels=4", "--key-file", "my.key")
    run("compress", "net.pt", "-o", "a.st", *settings)
    assert "and none is given; pass it by --key-file" in run("load", "a.st", code=1).output
    assert "the key given is another one" in run("load", "a.st", "--key-file", "other.key", code=1).output
    run("load", "a.st", "--key-file", "my.key")
    data = Path("a.st").read_bytes()
    Path("cut.st").write_bytes(data[:-100])
    assert "truncated" in run("unpack", "cut.st", "-o", "b.st", "--key-file", "my.key", code=1).output
    run("unpack", "cut.st", "-o", "b.st", "--fraction", "1", "--key-file", "my.key")
    run("unpack", "a.st", "-o", "c.st", "--fraction", "0.75", "--key-file", "my.key")
    assert Path("b.st").read_bytes() == Path("c.st").read_bytes()


def test_codecs() -> None:
    text = run("codecs").output
    assert (
        "trellis: trellis-coded quantisation" in text and 'code_bits=4, state_bits=0, seed=0, effort="default"' in text
    )
    codecs = {codec["id"]: codec for codec in json.loads(run("codecs", "--json").stdout)}
    assert list(codecs) == codec_ids()
    assert codecs["trellis"]["bits"] == "1 to 8" and codecs["mask"]["settings"]["kept"] == 0.5
    assert codecs["stack"]["required"] == ["matrix_rows", "matrix_columns", "of"] and all(
        c["summary"] for c in codecs.values()
    )


def test_codecs_of_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "nowhere:Codec", "seedpack.codecs")
    monkeypatch.setattr(names, "plugins", lambda: {"broken": broken})
    monkeypatch.setattr("seedpack.codecs.registry.plugins", names.plugins)
    assert "broken: cannot be imported: No module named 'nowhere'" in run("codecs").output


def test_bits_of_codecs_are_those_that_they_take() -> None:
    for id, bits in {"trellis": (1, 8), "seedlm": (3, 4), "svd": (0.1, 64), "basis": (0.1, 32)}.items():
        assert id in names.BITS
        for number in bits:
            names.require_bits(id, float(number))
            codec_for(id, float(number), {})


def test_quiet_and_verbose(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: object, **__: object) -> None:
        output.show_warning("odd", UserWarning, "", 0)
        assert logging.getLogger("seedpack").isEnabledFor(logging.DEBUG) == output.chose("verbose")
        assert os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == "1" or not output.chose("quiet")
        raise ZeroDivisionError

    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr("seedpack.api.compress", warn)
    for option, warned in (("-v", True), ("-q", False)):
        result = CliRunner().invoke(cli, [option, "compress", str(model), "-o", "x"])
        assert isinstance(result.exception, ZeroDivisionError) and ("Warning: odd" in result.stderr) == warned
    assert "Traceback" not in run("-v", "codecs", "--help").stderr
    assert not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    assert not logging.getLogger("seedpack").isEnabledFor(logging.DEBUG)


@pytest.mark.parametrize("option", ["-v", "-q"])
def test_unexpected_errors(option: str, tmp_path: Path) -> None:
    script = (
        f"import sys, seedpack.codecs.names as names; sys.argv[1:] = [{option!r}, 'codecs']\n"
        "names.codec_ids = None\nfrom seedpack.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "Error: unexpected: TypeError: 'NoneType' object is not callable" in done.stderr
    assert ("Traceback" in done.stderr) == (option == "-v")
