"""Text from packed models: streams, templates, conversations, sampling, and what is refused."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result

import seedpack
from seedpack.cli.main import cli
from seedpack.cli.output import printable
from tests.helpers.models import ARCHITECTURES, llama
from tests.helpers.tokenizers import CHAT_TEMPLATE, byte_tokenizer

FAST: dict[str, Any] = {"settings": {"effort": "fast"}}
BYTES: dict[str, Any] = {
    "vocab_size": 258,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def run(*arguments: object, code: int = 0, given: str | None = None) -> Result:
    result = CliRunner().invoke(cli, ["run", *map(str, arguments)], input=given)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def as_json(*arguments: object, **options: Any) -> dict[str, Any]:
    reply: dict[str, Any] = json.loads(run(*arguments, "--json", **options).stdout)
    return reply


def pack(path: Path, model: Any, tokenizer: Any, **options: Any) -> Path:
    model.save_pretrained(path / "dense")
    if tokenizer is not None:
        tokenizer.save_pretrained(path / "dense")
    seedpack.compress(path / "dense", path / "packed", **{**FAST, **options})
    return path / "packed"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return pack(tmp_path_factory.mktemp("plain"), llama(**BYTES), byte_tokenizer())


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return pack(tmp_path_factory.mktemp("chatty"), llama(**BYTES), byte_tokenizer(CHAT_TEMPLATE))


def expected(folder: Path, text: str, count: int) -> str:
    """Return what transformers itself generates."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)[0]
    return str(tokenizer.decode(written[ids.shape[1] :], skip_special_tokens=True))


def test_the_text_is_that_of_transformers(plain: Path) -> None:
    reply = as_json(plain, "hello", "--max-new-tokens", 12)
    assert reply["text"] == expected(plain, "hello", 12)
    assert reply["new_tokens"] == 12 and reply["tokens_per_second"] > 0 < reply["first_token_seconds"]
    assert as_json(plain, "hello", "--max-new-tokens", 12, "--raw")["text"] == reply["text"]
    assert as_json(plain.parent / "dense", "hello", "--max-new-tokens", 5)["new_tokens"] == 5


def test_text_comes_as_it_is_written(plain: Path) -> None:
    result = run(plain, "hello", "--max-new-tokens", 12, "--stats")
    controls = {c for c in result.stdout if c < " "} - {"\n", "\t"}
    assert not controls and result.stdout.endswith("\n")
    assert "12 tokens, " in result.stderr and "tokens/s, the first after" in result.stderr


@pytest.mark.parametrize("arguments", [["-"], []])
def test_prompts_from_standard_input(plain: Path, arguments: list[str]) -> None:
    piped = as_json(plain, *arguments, "--max-new-tokens", 4, given="hello")
    assert piped["text"] == as_json(plain, "hello", "--max-new-tokens", 4)["text"]
    assert "the prompt is empty" in run(plain, *arguments, code=2, given=" \n").stderr


def test_the_chat_template(chatty: Path) -> None:
    reply = as_json(chatty, "hello", "--max-new-tokens", 8)
    assert reply["text"] == expected(chatty, "[user]hello[assistant]", 8).lstrip()
    assert as_json(chatty, "hello", "--raw", "--max-new-tokens", 8)["text"] == expected(chatty, "hello", 8)
    system = as_json(chatty, "hello", "--system", "be brief", "--max-new-tokens", 8)
    assert system["text"] == expected(chatty, "[system]be brief[user]hello[assistant]", 8).lstrip()


def test_seeds(plain: Path) -> None:
    def sample(*more: object) -> str:
        return str(as_json(plain, "hello", "--temperature", 1, "--max-new-tokens", 16, *more)["text"])

    assert sample("--seed", 1) == sample("--seed", 1) != sample("--seed", 2)
    assert sample() != sample()
    assert sample("--top-k", 1) == as_json(plain, "hello", "--max-new-tokens", 16)["text"]
    assert sample("--top-p", 1e-6) == sample("--top-k", 1)


def test_a_chat_keeps_its_history(chatty: Path) -> None:
    from seedpack.hf.generation import Sampling, TextGenerator

    text = run(chatty, "--chat", "--max-new-tokens", 6, given="hello\n\nagain\n/reset\nhello\n/exit\nnever\n").stdout
    generator, fresh, sampling = TextGenerator(chatty), TextGenerator(chatty), Sampling(max_new_tokens=6)
    ignore = list[str]().append
    messages = [{"role": "user", "content": "hello"}]
    first = generator.answer(messages, sampling, ignore)
    messages += [{"role": "assistant", "content": first.text.strip()}, {"role": "user", "content": "again"}]
    held = generator._reusable(generator._tokenizer.apply_chat_template(messages)["input_ids"])
    assert held is not None and held.get_seq_length() >= len("[user]hello[assistant]")
    generator._cache = held
    second = generator.answer(messages, sampling, ignore)
    assert second.text == fresh.answer(messages, sampling, ignore).text, "with the cache as without"
    assert text == "".join(f"{printable(reply.text)}\n" for reply in (first, second, first))


def test_caches_of_other_kinds_are_not_cut(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seedpack.hf.generation import Sampling, TextGenerator

    generator = TextGenerator(chatty)
    generator.answer([{"role": "user", "content": "hello"}], Sampling(max_new_tokens=3), list[str]().append)
    monkeypatch.setattr("seedpack.hf.generation.DynamicLayer", object)
    assert generator._reusable([1, 2, 3]) is None


def test_a_chat_at_a_terminal(chatty: Path) -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "seedpack", "run", str(chatty), "--max-new-tokens", "4"],
        stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    seen, sent = b"", 0
    while True:
        try:
            seen += os.read(leader, 1 << 16)
        except OSError:
            break
        if seen.count(b"> ") > sent:
            os.write(leader, b"hello\n" if not sent else b"\x04")
            sent += 1
    os.close(leader)
    text = seen.decode("utf-8", "replace")
    assert process.wait() == 0 and "Traceback" not in text, text
    assert "Loading" in text and "Ctrl-D ends" in text and sent == 2


@pytest.mark.parametrize("when", ["builtins.input", "seedpack.hf.generation.TextGenerator.answer"])
def test_ctrl_c_ends_a_chat(chatty: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(when, interrupt)
    assert run(chatty, "--chat", given="hello\n").stdout == "\n"


def test_characters_are_whole() -> None:
    from seedpack.hf.generation import _TextStream

    tokenizer, pieces = byte_tokenizer(), list[str]()
    stream = _TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor(tokenizer("a")["input_ids"])[None])
    text = "é 東京 👩‍🚀 नमस्ते สวัสดี"
    tokens = tokenizer(text)["input_ids"]
    for token in tokens:
        stream.put(torch.tensor([token]))
    assert "".join(pieces) == text == stream.text and all("\ufffd" not in piece for piece in pieces)
    assert stream.new_tokens == len(tokens) and len(pieces) == len(text)
    stream.put(torch.tensor(tokenizer("é")["input_ids"][:1]))
    stream.end()
    assert pieces[-1] == "\ufffd"


def test_a_share_of_the_levels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    packed = pack(tmp_path, llama(**BYTES), byte_tokenizer(), codec="svd", settings={"rank": 8, "levels": 4})
    whole = as_json(packed, "hello", "--max-new-tokens", 12)["text"]
    assert as_json(packed, "hello", "--max-new-tokens", 12, "--fraction", 1)["text"] == whole
    assert as_json(packed, "hello", "--max-new-tokens", 12, "--fraction", 0.25)["text"] != whole
    assert as_json(packed, "hello", "--max-new-tokens", 12, "--max-bytes", "1GB")["text"] == whole
    assert "is not packed" in run(packed.parent / "dense", "x", "--fraction", 0.5, code=1).stderr


def test_encoder_and_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=258, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=1  # type: ignore[call-arg]
    )  # fmt: skip
    packed = pack(tmp_path, transformers.T5ForConditionalGeneration(config), byte_tokenizer())
    reply = as_json(packed, "translate me", "--max-new-tokens", 6)
    assert 1 <= reply["new_tokens"] <= 6


def test_end_of_text_and_of_the_context(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(**{**BYTES, "max_position_embeddings": 32})
    packed = pack(tmp_path, model, byte_tokenizer())
    assert as_json(packed, "x" * 20)["new_tokens"] <= 12
    assert "the prompt has 40 tokens, the model's context 32" in run(packed, "x" * 40, code=1).stderr
    first = byte_tokenizer()(as_json(packed, "x", "--max-new-tokens", 1)["text"])["input_ids"][0]
    ending = json.loads((packed / "generation_config.json").read_text()) | {"eos_token_id": [first, 1]}
    (packed / "generation_config.json").write_text(json.dumps(ending))
    assert as_json(packed, "x")["new_tokens"] == 1


def test_mistakes(plain: Path, chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--chat needs a chat template" in run(plain, "--chat", code=2).stderr
    assert "--system needs a chat template" in run(plain, "x", "--system", "y", code=2).stderr
    assert "--raw does without the chat template" in run(chatty, "x", "--raw", "--system", "y", code=2).stderr
    assert "add --temperature" in run(plain, "x", "--top-k", 3, code=2).stderr
    assert "temperature must be from 0 to 100" in run(plain, "x", "--temperature", "nan", code=2).stderr
    assert "top_p must be above 0" in run(plain, "x", "--temperature", 1, "--top-p", "nan", code=2).stderr
    assert "a chat has many" in run(chatty, "--chat", "--json", code=2).stderr
    refusing = "{{ raise_exception('not today') }}"
    (tmp_path / "refusing").mkdir()
    torch.manual_seed(0)
    refused = pack(tmp_path / "refusing", llama(**BYTES), byte_tokenizer(refusing))
    assert "refuses the messages (not today); --raw does without" in run(refused, "x", code=1).stderr
    assert "not today" in run(refused, "--chat", code=1, given="x\n").stderr
    (tmp_path / "bert").mkdir()
    bert = pack(tmp_path / "bert", ARCHITECTURES["bert"](), None)
    assert "a BertForMaskedLM does not generate text" in run(bert, "x", code=1).stderr
    (tmp_path / "mute").mkdir()
    mute = pack(tmp_path / "mute", llama(), None)
    assert "no tokenizer that transformers can load" in run(mute, "x", code=1).stderr
    torch.save({"a.weight": torch.randn(8, 8)}, tmp_path / "net.pt")
    message = f"{tmp_path / 'net.pt'} is a torch checkpoint, not a packed checkpoint; run seedpack compress"
    assert message in run(tmp_path / "net.pt", "x", code=1).stderr
    seedpack.compress(tmp_path / "net.pt", tmp_path / "net", **FAST)
    assert "not a Hugging Face folder" in run(tmp_path / "net", "x", code=1).stderr
