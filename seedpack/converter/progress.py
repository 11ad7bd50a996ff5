"""Progress of long work, in Python and notebooks: tqdm's bars, one for each stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from seedpack.converter.options import Progress, silent


@contextmanager
def shown(progress: Progress | bool) -> Iterator[Progress]:
    """Yield what is told of progress: the given function, or one that shows bars until this ends (True), or nothing (False)."""
    if not isinstance(progress, bool):
        yield progress
    elif progress:
        bars = _Bars()
        try:
            yield bars
        finally:
            bars.close()
    else:
        yield silent


class _Bars:
    """The bar of the current stage."""

    def __init__(self) -> None:
        self._stage, self._bar = "", None

    def __call__(self, stage: str, done: int, total: int, unit: str = "", item: str = "", /) -> None:
        from tqdm.auto import tqdm

        if item and not unit:
            tqdm.write(item)
            return
        if stage != self._stage:
            self.close()
            self._stage, self._bar = (
                stage,
                tqdm(desc=stage, total=total or None, unit=f" {unit}", unit_scale=True, leave=False),
            )
        bar: Any = self._bar
        if item:
            bar.set_postfix_str(item, refresh=False)
        bar.update(done)

    def close(self) -> None:
        """Finish the bar of the current stage."""
        if self._bar is not None:
            self._bar.close()
        self._stage, self._bar = "", None
