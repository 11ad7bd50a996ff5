"""The command `seedpack run`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seedpack.cli import output
from seedpack.cli.checks import check_folder
from seedpack.errors import SeedpackError

if TYPE_CHECKING:
    from seedpack.hf.generation import Message, Reply, Sampling, TextGenerator


@click.command("run")
@click.argument("packed", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Talk: each line is a message. /reset forgets all, /exit or Ctrl-D ends.")
@click.option("--system", metavar="TEXT", help="The message before the first one: how the model is to answer.")
@click.option("--raw", is_flag=True, help="Go on from the prompt as it is, without the chat template.")
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="0 takes the most probable token, 1 samples from the model's distribution.",
)
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the tokens of this probability together."
)
@click.option("--top-k", type=click.IntRange(1), help="Sample from so many of the most probable tokens.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Of the sampling; default: another one each time.")
@click.option(
    "--max-new-tokens", default=256, show_default=True, type=click.IntRange(1), help="Stop after this many tokens."
)
@click.option("--stats", is_flag=True, help="Print tokens/s and the time to the first token on standard error.")
@output.fraction_option
@output.key_option
@output.max_bytes_option
@output.trust_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON at the end, instead of text as it comes.")
def command(
    packed: Path,
    prompt: str | None,
    chat: bool,
    system: str | None,
    raw: bool,
    seed: int | None,
    stats: bool,
    fraction: float | None,
    max_bytes: int | None,
    trust_remote_code: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text with the language model in the folder PACKED, which may be dense too.

    PROMPT is a message to answer if the tokenizer has a chat template, else a text to go on from. Without one, or if it is
    -, it is read from standard input; at a terminal a chat begins.
    """
    if prompt is None and sys.stdin.isatty() and not raw:
        chat = True
    _check(chat, raw, system, as_json, sampling)
    if not chat:
        prompt = _read_prompt(prompt)
    check_folder(packed)
    import torch

    from seedpack.converter.trust import trusting_remote_code
    from seedpack.hf.generation import Sampling, TextGenerator

    output.quiet_transformers()
    torch.seed() if seed is None else torch.manual_seed(seed)
    with trusting_remote_code(trust_remote_code), output.waiting(f"Loading {packed}") as loaded:
        generator = TextGenerator(packed, fraction=fraction, max_bytes=max_bytes)
        if (chat or system) and not generator.has_template:
            option = "--chat" if chat else "--system"
            raise click.UsageError(f"{option} needs a chat template, which the tokenizer in {packed} does not have")
        talk = _Talk(generator, Sampling(**sampling), system, stats)
        if chat:
            loaded()
            talk.go_on(prompt)
            return
        assert prompt is not None

        def write(piece: str) -> None:
            if not as_json:
                loaded()
                _write(piece)

        if raw or not generator.has_template:
            reply = generator.complete(prompt, talk.sampling, write)
        else:
            reply = talk.answer(prompt, write)
    if as_json:
        output.show_json(dataclasses.asdict(reply))
        return
    click.echo()
    talk.show(reply)


def _check(chat: bool, raw: bool, system: str | None, as_json: bool, sampling: dict[str, Any]) -> None:
    """Refuse options that exclude each other."""
    if raw and (chat or system is not None):
        raise click.UsageError("--raw does without the chat template, which --chat and --system need")
    if chat and as_json:
        raise click.UsageError("--json prints one text, and a chat has many")
    if not sampling["temperature"] and (sampling["top_p"] or sampling["top_k"]):
        raise click.UsageError("--top-p and --top-k are for sampling: add --temperature 0.7")


def _read_prompt(prompt: str | None) -> str:
    """Return the prompt, from standard input if it is not given."""
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("give a prompt, or - to type one that Ctrl-D ends")
    text = _whole(sys.stdin.read()) if prompt in (None, "-") else prompt
    if text is None or not text.strip():
        raise click.UsageError("the prompt is empty")
    return text


def _whole(text: str) -> str:
    """Replace halves of characters, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def _write(piece: str) -> None:
    """Print a piece of text, which cannot control the terminal."""
    click.echo(output.printable(piece), nl=False)


class _Talk:
    """A conversation: what was said, and how to go on."""

    def __init__(self, generator: TextGenerator, sampling: Sampling, system: str | None, stats: bool):
        self.sampling, self._generator, self._stats = sampling, generator, stats
        self._start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._start)

    def answer(self, message: str, write: Any) -> Reply:
        """Answer a message, and keep both; neither if that fails."""
        messages = [*self._messages, {"role": "user", "content": message}]
        reply = self._generator.answer(messages, self.sampling, write)
        self._messages = [*messages, {"role": "assistant", "content": reply.text.strip()}]
        return reply

    def go_on(self, first: str | None) -> None:
        """Answer message after message, until there are no more."""
        if sys.stdin.isatty():
            output.note("Talk to the model; /reset forgets all that was said, /exit or Ctrl-D ends.")
        try:
            for message in _messages(first):
                if message == "/exit":
                    break
                if message == "/reset":
                    self._messages = list(self._start)
                    output.note("Forgotten.")
                    continue
                try:
                    reply = self.answer(message, _write)
                except SeedpackError as error:
                    if not sys.stdin.isatty():
                        raise
                    output.echo(f"Error: {error}; /reset begins anew", err=True)
                    continue
                click.echo()
                self.show(reply)
        except (KeyboardInterrupt, EOFError):
            click.echo()

    def show(self, reply: Reply) -> None:
        """Print how fast a reply came, if that is asked for."""
        if self._stats:
            output.echo(
                f"{reply.new_tokens} tokens, {reply.tokens_per_second:.2f} tokens/s, "
                f"the first after {output.duration(reply.first_token_seconds)}",
                err=True,
            )


def _messages(first: str | None) -> Iterator[str]:
    """Yield the first message if there is one, then the lines of standard input; EOFError ends them."""
    if first is not None:
        yield first
    mark = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (lines can be edited, and called back)

        mark = "> "
    while True:
        if message := _whole(input(mark)).strip():
            yield message
