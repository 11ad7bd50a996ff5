"""Text from a language model of a folder, token by token: completions, and answers in a conversation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.streamers import BaseStreamer

from seedpack.converter.trust import trusts_remote_code
from seedpack.errors import ModelError, OptionError, SeedpackError, first_line
from seedpack.formats import Checkpoint
from seedpack.formats.reader import manifest_from_config, read_json
from seedpack.hf.complete import load_complete
from seedpack.hf.internals import cache_name
from seedpack.hf.language_model import tokenizer_of
from seedpack.hf.loading import load_pretrained
from seedpack.hf.quantization import strip_quantization
from seedpack.hf.remote_code import model_class
from seedpack.loader.fill import fill_

Write = Callable[[str], None]
Message = dict[str, str]  # role and content
CONTEXT = 8  # tokens of the prompt that the first ones of the text are decoded with: they tell of a space between


@dataclass(frozen=True)
class Sampling:
    """The choice of each token.

    Attributes:
        temperature: 0 takes the most probable token.
        top_p: sample from the most probable tokens that have this probability together; default the model's own.
        top_k: sample from so many of the most probable tokens; default the model's own.
        max_new_tokens: at most, and no more than the model's context has room for.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise OptionError(f"temperature must be from 0 to 100, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise OptionError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def options(self) -> dict[str, Any]:
        """Return the options of transformers' `generate`."""
        if not self.temperature:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        limits = {"top_p": self.top_p, "top_k": self.top_k}
        chosen = {name: value for name, value in limits.items() if value is not None}
        return {"do_sample": True, "temperature": self.temperature, **chosen}


@dataclass(frozen=True)
class Reply:
    """Text of a model, with the time that it took; tokens/s are those after the first one."""

    text: str
    new_tokens: int
    tokens_per_second: float
    first_token_seconds: float


class TextGenerator:
    """A model and its tokenizer.

    Args:
        path: a packed Hugging Face folder, or a dense one.
        reading: `fraction` and `max_bytes`, as `seedpack.formats.Checkpoint` takes them.

    Raises:
        ModelError: the folder has no tokenizer, or its model does not go from text to text.
    """

    def __init__(self, path: Path, **reading: Any):
        self._path = path
        self._model = _load(path, {name: value for name, value in reading.items() if value is not None})
        if not self._model.can_generate() or self._model.main_input_name != "input_ids":
            raise ModelError(f"{path}: a {type(self._model).__name__} does not generate text from text")
        self._tokenizer = tokenizer_of(path)
        if self._tokenizer is None:
            raise ModelError(f"{path}: no tokenizer that transformers can load; put the model's own into the folder")
        self._seen: list[int] = []  # the tokens whose keys and values the cache holds
        self._cache: Any = None

    @property
    def has_template(self) -> bool:
        """True if the tokenizer says how a conversation is written."""
        return bool(self._tokenizer.chat_template)

    def complete(self, text: str, sampling: Sampling, write: Write) -> Reply:
        """Go on from a text as it is; `write` gets the new text piece by piece."""
        return self._generate(self._tokenizer(text, return_tensors="pt"), sampling, write)

    def answer(self, messages: Sequence[Message], sampling: Sampling, write: Write) -> Reply:
        """Answer the last message of a conversation; `write` gets the answer piece by piece.

        Keys and values of the messages that the last answer was for are not computed again, where the cache allows it.

        Raises:
            ModelError: the template refuses the messages.
        """
        try:
            inputs = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # the template's own
            raise ModelError(
                f"{self._path}: the chat template refuses the messages ({first_line(error)}); --raw does without it"
            ) from error
        return self._generate(inputs, sampling, write, is_answer=True)

    def _generate(self, inputs: Any, sampling: Sampling, write: Write, is_answer: bool = False) -> Reply:
        ids: Tensor = inputs["input_ids"]
        count = ids.shape[1]
        if not count:
            raise ModelError(f"{self._path}: the prompt has no tokens")
        stream = _TextStream(self._tokenizer, write, is_answer)
        cache, self._cache = self._reusable(ids[0].tolist()), None  # an interrupt leaves none
        started = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(self._model.device),
                attention_mask=inputs["attention_mask"].to(self._model.device),
                max_new_tokens=min(sampling.max_new_tokens, self._room(count)),
                num_beams=1,
                streamer=stream,
                return_dict_in_generate=True,
                **({} if cache is None else {cache_name(): cache}),
                **sampling.options(),
            )
        seconds = time.perf_counter() - started
        self._cache, self._seen = getattr(output, cache_name(), None), output.sequences[0].tolist()
        first = (stream.first_token_at or started) - started
        later, rest = stream.new_tokens - 1, seconds - first
        rate = later / rest if later > 0 else stream.new_tokens / seconds
        return Reply(stream.text, stream.new_tokens, rate, first)

    def _room(self, count: int) -> int:
        """Return how many tokens the model's context has room for after a prompt of so many."""
        config = self._model.config.get_text_config()
        limit = None if self._model.config.is_encoder_decoder else getattr(config, "max_position_embeddings", None)
        if not limit or limit < 0:
            return 1 << 31
        if count >= limit:
            raise ModelError(f"{self._path}: the prompt has {count} tokens, the model's context {limit}; shorten it")
        return int(limit) - count

    def _reusable(self, ids: list[int]) -> Any:
        """Return the cache, cut to what a prompt has in common with the tokens that it holds; None if it cannot be cut."""
        cache = self._cache
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        held = int(cache.get_seq_length())
        pairs = zip(self._seen[:held], ids[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if common < held:
            cache.crop(common - held)
        return cache if common else None


class _TextStream(BaseStreamer):
    """Decodes tokens as they come and writes whole characters; a token may end in the middle of one.

    Args:
        tokenizer: of transformers.
        write: gets the text.
        is_answer: leave out the space before the first word.
    """

    def __init__(self, tokenizer: Any, write: Write, is_answer: bool = False):
        self._tokenizer, self._write, self._is_answer = tokenizer, write, is_answer
        self._ids: list[int] = []
        self._start = self._written = 0  # of the tokens that the next ones are decoded with, and of the next ones
        self._prompt_tokens: int | None = None
        self._pieces: list[str] = []
        self.first_token_at: float | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then each new token."""
        self._ids += value.flatten().tolist()
        if self._prompt_tokens is None:
            self._prompt_tokens = self._written = len(self._ids)
            self._start = max(0, self._written - CONTEXT)
            return
        self.first_token_at = self.first_token_at or time.perf_counter()
        self._flush()

    def end(self) -> None:
        """Write what is left, also half a character."""
        self._flush(last=True)

    @property
    def text(self) -> str:
        """All that was written."""
        return "".join(self._pieces)

    @property
    def new_tokens(self) -> int:
        """Count of tokens after the prompt."""
        return len(self._ids) - (self._prompt_tokens or 0)

    def _flush(self, last: bool = False) -> None:
        before, after = self._decode(self._ids[self._start : self._written]), self._decode(self._ids[self._start :])
        if len(after) > len(before) and (last or not after.endswith("\N{REPLACEMENT CHARACTER}")):
            piece = after[len(before) :]
            piece = piece.lstrip() if self._is_answer and not self._pieces else piece
            if piece:
                self._pieces.append(piece)
                self._write(piece)
            self._start, self._written = self._written, len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _load(path: Path, reading: dict[str, Any]) -> Any:
    """Load a folder's model, whose layers stay packed if they are."""
    options: dict[str, Any] = {"trust_remote_code": True} if trusts_remote_code() else {}
    config = read_json(path / "config.json")
    is_packed = manifest_from_config(config, str(path)) is not None
    if is_packed and not reading:
        return load_pretrained(path, **options)
    cls = model_class(path, config)
    try:
        if reading:
            return _fill(path, cls, reading, options)
        return load_complete(cls, path, path, dtype="auto", **options)
    except (SeedpackError, OSError, MemoryError):
        raise
    except Exception as error:  # transformers' own
        raise ModelError(f"{path}: transformers cannot load it ({first_line(error)})") from error


def _fill(path: Path, cls: Any, reading: dict[str, Any], options: dict[str, Any]) -> Any:
    """Make a packed folder's model and fill it: transformers itself reads files whole, and knows no limit."""
    with Checkpoint(path, **reading) as checkpoint:
        config = AutoConfig.from_pretrained(path, **options)
        strip_quantization(config)
        model = cls.from_config(config, **options) if hasattr(cls, "from_config") else cls(config)
        fill_(model, checkpoint)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()
