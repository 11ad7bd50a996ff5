"""Print tables, progress and JSON, alike for every command."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from seedpack.units import count as count
from seedpack.units import duration as duration
from seedpack.units import size as size

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def parse_size(text: str) -> int:
    """Parse a size such as "5GB", "200 MB" or a plain number of bytes."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.strip().upper()
    unit = number.lstrip("0123456789. ")
    try:
        value = float(number.removesuffix(unit)) * units[unit]
    except (KeyError, ValueError):
        raise click.BadParameter(f"not a valid size: {text[:40]!r}; write 5GB or 200MB") from None
    if not 1 <= value < 2**63:
        raise click.BadParameter("the size must be from one byte to 9 EB")
    return int(value)


def db(value: float) -> str:
    """Format a level in decibels."""
    return f"{value:.2f} dB" if math.isfinite(value) else "exact" if value < 0 else "unbounded"


def printable(text: str) -> str:
    """Replace what could control the terminal in a text from a file: control characters, and changes of direction."""
    return CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def on_one_line(text: str) -> str:
    """Replace line breaks too."""
    return printable(text).replace("\n", "\N{REPLACEMENT CHARACTER}")


def echo(text: str, *, err: bool = False, lines: bool = False) -> None:
    """Print a line, whatever it may have taken from a file or a path; or a text of several lines."""
    click.echo(printable(text) if lines else on_one_line(text), err=err)


def chose(option: str) -> bool:
    """Return whether an option of the program itself, --quiet or --verbose, is given."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.find_root().params.get(option))


def note(text: str) -> None:
    """Print a line on standard error, unless --quiet is given."""
    if not chose("quiet"):
        echo(text, err=True)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Print a warning as one line, in place of `warnings.showwarning`."""
    note(f"Warning: {message}")


@contextlib.contextmanager
def waiting(text: str) -> Iterator[Callable[[], None]]:
    """Say what is waited for on standard error if it is a terminal, until the end or the call of what is yielded."""
    with contextlib.ExitStack() as stack:
        if sys.stderr.isatty() and not chose("quiet"):
            from rich.console import Console
            from rich.text import Text

            stack.enter_context(Console(stderr=True).status(Text(on_one_line(text))))
        yield stack.close


FEW_ROWS = 6  # that fit beside each other


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] | None = None
) -> None:
    """Print a table; the first column is text, the others are numbers, which are never cut.

    Where a terminal is too narrow for it, a table of few rows is turned round, and the lines of others run on.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, total or columns, strict=True)]
    least = 18 + sum(widths[1:]) + 3 * len(columns)
    if _console().width < least and len(rows) <= FEW_ROWS and total is None and len(columns) > len(rows) + 1:
        turned = list(zip(*rows, strict=True))
        show_table(
            title, (columns[0], *turned[0]), [(name, *row) for name, row in zip(columns[1:], turned[1:], strict=True)]
        )
        return
    table = Table(box=box.SIMPLE_HEAD, show_footer=total is not None, pad_edge=False)
    for i, name in enumerate(columns):
        footer = Text("" if total is None else on_one_line(total[i]))
        table.add_column(
            name, footer, justify="right" if i else "left", overflow="fold", no_wrap=i > 0, min_width=0 if i else 18
        )
    for row in rows:
        table.add_row(*(Text(on_one_line(cell)) for cell in row))
    _print_below(title, table, least)


def show_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Print pairs of a name and a value."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, Text(on_one_line(value)))
    _print_below(title, table)


def _console(least: int = 0) -> Any:
    """Return the terminal, or a page of 160 columns, and no fewer than are needed."""
    from rich.console import Console

    console = Console()
    width = console.width if console.is_terminal else 160
    return Console(width=max(width, least))


def _print_below(title: str, table: Any, least: int = 0) -> None:
    """Print a table below its title."""
    from rich.text import Text

    console = _console(least)
    console.print(Text(on_one_line(title), style="bold"), soft_wrap=True)
    console.print(table)


def show_json(document: Any) -> None:
    """Print JSON, with null for infinities, which JSON cannot express."""
    click.echo(json.dumps(_finite(document), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Work:
    """The units that are done of a stage, their rate, and the time that is left.

    The clock starts with the first of them: what comes before is compiling, or reading.
    """

    def __init__(self, total: int, unit: str):
        self.total, self.unit, self.done = total, unit, 0
        self._started = self._since = time.perf_counter()
        self._before = 0

    def advance(self, count: int) -> None:
        if count and not self.done:
            self._since, self._before = time.perf_counter(), count
        self.done += count

    def _rate(self) -> float:
        start, before = (self._since, self._before) if self.done > self._before else (self._started, 0)
        return (self.done - before) / max(1e-9, time.perf_counter() - start)

    def texts(self) -> tuple[str, str, str]:
        """Return the share that is done, the rate, and the time left, where they are known."""
        if not self.total:
            return "", "", ""
        rate = self._rate()
        left = f"{duration((self.total - self.done) / rate)} left" if rate else ""
        return (
            f"{100 * self.done / self.total:.0f}%",
            f"{_count(rate)} {self.unit}/s" if rate else "",
            left,
        )


@contextlib.contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Callable[[str, int], None]]:
    """Show a progress bar with rate and time left on standard error, or a line every 30 s if it is not a terminal.

    Yields a function of (current item, units done since the last call).
    """
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {"1", "ON", "YES", "TRUE"}:
        yield lambda item, count: None
    elif sys.stderr.isatty():
        with _bar(label, _Work(total, unit)) as advance:
            yield advance
    else:
        yield _lines(label, _Work(total, unit))


@contextlib.contextmanager
def stages() -> Iterator[Callable[..., None]]:
    """Show the progress of work in stages, one after the other.

    Yields a function of (stage, units done since the last call, units in all or 0, unit, current item), which prints an item that
    has no unit.
    """
    with contextlib.ExitStack() as stack:
        current: dict[str, Callable[[str, int], None]] = {}

        def advance(stage: str, count: int, total: int, unit: str = "", item: str = "") -> None:
            if item and not unit:
                note(item)
                return
            if stage not in current:
                stack.close()
                current.clear()
                current[stage] = stack.enter_context(progress(stage, total, unit))
            current[stage](item, count)

        yield advance


@contextlib.contextmanager
def _bar(label: str, work: _Work) -> Iterator[Callable[[str, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    names = ("share", "rate", "left")
    rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)  # the item gets what is left of the line
    columns = (
        TextColumn(label, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16),
        *(TextColumn(f"{{task.fields[{name}]}}", table_column=Column(no_wrap=True)) for name in names),
        TextColumn("{task.fields[item]}", style="dim", markup=False, table_column=rest),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task(label, total=work.total or None, item="", share="", rate="", left="")

        def advance(item: str, count: int) -> None:
            work.advance(count)
            texts: dict[str, Any] = dict(zip(names, work.texts(), strict=True))
            bar.update(task, advance=count, item=on_one_line(item), **texts)

        yield advance


def _lines(label: str, work: _Work) -> Callable[[str, int], None]:
    last = time.perf_counter()

    def advance(item: str, count: int) -> None:
        nonlocal last
        work.advance(count)
        now = time.perf_counter()
        if now - last >= 30 and work.done:
            last = now
            click.echo(f"{label}: {', '.join(filter(None, work.texts()))}", err=True)

    return advance


def _count(value: float) -> str:
    if value >= 1000:
        return f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.0f}k"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def quiet_transformers() -> None:
    """Silence the load reports and progress bars of transformers, unless --verbose is given."""
    import transformers

    if chose("verbose"):
        transformers.logging.set_verbosity_info()
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _use_key_file(ctx: click.Context, option: click.Parameter, path: str | None) -> None:
    if path is not None:
        from seedpack.keys import read_key, use_key

        use_key(read_key(path))


key_option = click.option(
    "--key-file",
    type=click.Path(),
    expose_value=False,
    callback=_use_key_file,
    help="File of the private key (16 bytes or 32 hexadecimal digits), for weights that are regenerated with one.",
)


def _parse_limit(ctx: click.Context, option: click.Parameter, size: str | None) -> int | None:
    return None if size is None else parse_size(size)


def limit_option(text: str) -> Callable[[Any], Any]:
    """Return the option --max-bytes with its help."""
    return click.option("--max-bytes", metavar="SIZE", callback=_parse_limit, help=text)


trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run the Python code in the model's folder, where that defines the model."
)
max_bytes_option = limit_option(
    "What decoding a tensor may take, as 5GB, of a file that you trust. Default: 1GB, or 1024 times the file if that is more, "
    "and no more than is free."
)
fraction_option = click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    help="Read only this share of the levels of tensors stored in levels; the file may be cut off after them.",
)
