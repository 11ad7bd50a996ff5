"""Shares of a model's tensors, fitted by processes that have nothing in common but storage, and merged at the end."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from seedpack.converter.plan import Plan
from seedpack.converter.run import Run
from seedpack.converter.statistics import Statistics
from seedpack.converter.workers import require_reopened
from seedpack.errors import ModelError, OptionError, OutputError
from seedpack.formats.lock import locked
from seedpack.formats.places import is_remote, reaching
from seedpack.formats.staging import exists_already, stage_of
from seedpack.units import count


@dataclass(frozen=True)
class Shard:
    """One of some shares of a model's tensors, of about as many weights each.

    Attributes:
        number: from 1.
        count: of all.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise OptionError(
                f"shard {self.number}/{self.count}: expected one from 1/{self.count} to {self.count}/{self.count}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "3/8"; "env" is RANK + 1 of WORLD_SIZE, as batch schedulers and torchrun set them.

        Raises:
            OptionError: it is neither.
        """
        if text == "env":
            rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
            if not (rank.isdigit() and size.isdigit()):
                raise OptionError(
                    f"shard env: expected numbers in RANK and WORLD_SIZE, found {rank!r} and {size!r}; name it as 3/8"
                )
            return cls(int(rank) + 1, int(size))
        number, _, size = text.partition("/")
        if not (number.isdigit() and size.isdigit()):
            raise OptionError(f"shard {text!r}: expected 3/8, the third of eight, or env for RANK and WORLD_SIZE")
        return cls(int(number), int(size))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, plan: Plan) -> frozenset[str]:
        """Return the names of this share's packed tensors: the largest first, each to the share with the fewest weights.

        Raises:
            OptionError: there are more shares than tensors.
        """
        weights, names = [0] * self.count, [list[str]() for _ in range(self.count)]
        for tensor in sorted((t for t in plan.tensors if t.packed), key=lambda t: (-math.prod(t.shape), t.name)):
            least = weights.index(min(weights))
            weights[least] += math.prod(tensor.shape)
            names[least].append(tensor.name)
        if not names[-1]:
            packed = sum(map(len, names))
            raise OptionError(
                f"shard {self}: the plan packs {count(packed, 'tensor')}; ask for no more shards than that"
            )
        return frozenset(names[self.number - 1])

    def require_possible(self, run: Run) -> None:
        """Refuse what shares of a model cannot be made of.

        Raises:
            OptionError: a private key is given.
            ModelError: the model is in memory, or calibrated with an output in remote storage.
            OutputError: the output stands already.
        """
        require_reopened(run)
        if run.options.key is not None:
            raise OptionError(
                "each shard would draw a seed of its own for a private key; leave one of them out (--jobs N)"
            )
        if run.calibration is not None and is_remote(run.output):
            raise ModelError(
                f"{run.output}: shards share one calibration, which needs a file system; name an output there, and copy it"
            )
        with reaching(run.output) if is_remote(run.output) else nullcontext():
            stands = run.output.exists()
        if stands and not run.options.force:
            raise OutputError(exists_already(run.output))

    def refusal(self, output: Path) -> tuple[str, str]:
        """Return how a second process on this share is refused: what, and the remedy."""
        return f"{output}: another run fits shard {self}", "give each process a shard of its own"


def require_fitted(run: Run, plan: Plan, statistics: Statistics) -> None:
    """Refuse to merge what is not all there.

    Raises:
        ModelError: with the count of tensors that are missing, and some of them.
    """
    assert run.journal is not None
    packed = [tensor for tensor in plan.tensors if tensor.packed]
    if missing := run.journal.missing(packed, statistics.importance):
        raise ModelError(
            f"{run.output}: {count(len(missing), 'tensor')} of {len(packed)} are not fitted yet, such as {missing[0].name!r}; run their "
            "shards (again: they go on where they stopped), with the same model and options"
        )


@contextmanager
def shards_kept_out(output: Path) -> Iterator[None]:
    """Refuse to write an output while shards of it are being fitted, and them meanwhile.

    Raises:
        OutputError: one is.
    """
    with ExitStack() as stack:
        for folder in sorted(stage_of(output).glob("shard-*")):
            what = f"{output}: its {folder.name.replace('-', ' ')} is still being fitted"
            stack.enter_context(locked(folder, what, "stop it"))
        yield
