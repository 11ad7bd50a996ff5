"""The group of commands: each is imported when it is named; errors become one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

import seedpack
from seedpack.cli.output import echo, on_one_line, printable, show_warning
from seedpack.cli.plain import print_anywhere
from seedpack.errors import OptionError, SeedpackError

log = logging.getLogger("seedpack")

COMMANDS = {
    "compress": "Pack a model into a seed + coefficient checkpoint.",
    "merge": "Write the checkpoint that the shards of a compress have fitted.",
    "run": "Generate text with a packed language model, or talk to it.",
    "serve": "Serve a packed language model over OpenAI's HTTP API, by transformers.",
    "load": "Load a packed model, report its layers, memory and time.",
    "inspect": "Show the tensors of any checkpoint, packed or not.",
    "verify": "Check every byte of a packed checkpoint against its digests.",
    "unpack": "Rebuild the dense model.",
    "compare": "Compare two models tensor by tensor: error and effective rank.",
    "image": "Compress an image into a neural field, and render it.",
    "eval": "Compare what packed models answer with their original: perplexity, embeddings, classes.",
    "report": "Write a page of HTML about a packed model, beside its original.",
    "push": "Upload a packed folder to the Hugging Face hub, with its model card.",
    "sweep": "Pack a model at several bits per weight, and plot what each loses.",
    "codecs": "List the codecs, with the bits and settings that they take.",
}

EXAMPLES = {
    "compress": [
        "seedpack compress HuggingFaceTB/SmolLM2-135M-Instruct -o packed",
        "seedpack compress model.safetensors --bits 3 --calibration self",
        "seedpack compress folder --target-size 90MB --dry-run",
    ],
    "merge": ["seedpack merge packed"],
    "run": ['seedpack run packed "What is the capital of France?"', "seedpack run packed --chat --temperature 0.7"],
    "serve": ["seedpack serve packed", "seedpack serve packed --host 0.0.0.0 --port 8080"],
    "load": ["seedpack load packed"],
    "inspect": ["seedpack inspect model.safetensors", "seedpack inspect packed --tensors '*mlp*'"],
    "verify": ["seedpack verify packed"],
    "unpack": ["seedpack unpack packed -o dense --dtype bfloat16"],
    "compare": ["seedpack compare net.pt net.safetensors"],
    "image": [
        "seedpack image compress photo.png -o photo.spi --bytes 20kB",
        "seedpack image decompress photo.spi -o again.png",
    ],
    "eval": [
        "seedpack eval model packed-4 packed-3 --text wiki.txt",
        "seedpack eval model packed --text wiki.txt --text code.txt --card",
    ],
    "report": ["seedpack report packed model --text wiki.txt -o report.html"],
    "push": ["seedpack push packed me/SmolLM2-135M-4bit"],
    "sweep": ["seedpack sweep model --text wiki.txt --bits 2,2.5,3,4"],
    "codecs": ["seedpack codecs"],
}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"seedpack.cli.{cmd_name}").command
        command.epilog = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in EXAMPLES[cmd_name])
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, 1)
            raise click.UsageError(
                f"{error.message} Did you mean {close[0]!r}?" if close else error.message, ctx
            ) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SeedpackError as error:
            if error.__cause__ is not None:
                log.debug("caused by", exc_info=error.__cause__)
            kind = click.UsageError if isinstance(error, OptionError) else click.ClickException
            raise kind(on_one_line(str(error))) from None
        except click.ClickException as error:
            vars(error).update(message=printable(error.message))
            raise
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception:
            log.debug("unexpected error", exc_info=True)
            raise


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Do without those of transformers, its hub, and `output.progress`."""
    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    before = os.environ.get(name, "")
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ[name] = before


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(seedpack.__version__, "-V", "--version", prog_name="seedpack")
@click.option("-q", "--quiet", is_flag=True, help="Print results and errors alone: no progress, notes or warnings.")
@click.option(
    "-v", "--verbose", is_flag=True, help="Print what the libraries log, and tracebacks of unexpected errors."
)
@click.pass_context
def cli(ctx: click.Context, quiet: bool, verbose: bool) -> None:
    """Compress pretrained models into seed + coefficient checkpoints, and run them packed."""
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other")
    if quiet:
        ctx.with_resource(_without_progress_bars())
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        log.setLevel(logging.DEBUG)
        ctx.call_on_close(lambda: log.setLevel(logging.NOTSET))


def _end(code: int) -> None:
    """End at once: taking torch and compiled code down orderly takes seconds. Temporary folders are removed."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def main() -> None:
    """Run the program `seedpack`."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # half-written output is removed
        signal.signal(number, lambda caught, _: sys.exit(128 + caught))
    warnings.showwarning = show_warning
    print_anywhere()
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
    except BrokenPipeError:
        sys.exit(1)
    except (OSError, MemoryError) as error:
        echo(f"Error: {type(error).__name__}: {error}", err=True)
        sys.exit(1)
    except Exception as error:
        echo(
            f"Error: unexpected: {type(error).__name__}: {error} (seedpack -v prints where; please report it)", err=True
        )
        sys.exit(1)
    else:
        return
    # Here the exception is gone, and with it what kept a `with` alive that was interrupted at its entry: it has been closed.
    _end(130)
