"""The memory that this process has, and can still have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

UNLIMITED = 1 << 62
V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


def free_bytes(root: Path = Path("/")) -> int:
    """Return the memory that is free: of the machine, and of the control groups that this process is in (a container's).

    Where the system does not say, it is as much as one could wish.

    Args:
        root: of the file system that is asked.
    """
    return min([_machine(root), *_control_groups(root)])


def resident_bytes() -> int:
    """Return the memory that this process has now; 0 where the system does not say."""
    with suppress(OSError, ValueError, AttributeError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _machine(root: Path) -> int:
    with suppress(OSError, KeyError, ValueError, IndexError):
        return 1024 * _values(root / "proc/meminfo")["MemAvailable:"]
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return UNLIMITED


def _control_groups(root: Path) -> Iterator[int]:
    """Yield what is left in each group, from this process's own to the root of its tree; a limit holds for all below it.

    Page cache that nothing uses is left: the kernel drops it first.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        tree, names = (root / "sys/fs/cgroup/memory", V1) if controllers else (root / "sys/fs/cgroup", V2)
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):
                limit, used = (int((tree / folder / name).read_text()) for name in names)  # "max" is no number
                cache = _values(tree / folder / "memory.stat")
                yield max(0, limit - used + cache.get("total_inactive_file", cache.get("inactive_file", 0)))


def _values(file: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    pairs = (line.split()[:2] for line in file.read_text().splitlines())
    return {name: int(value) for name, value in pairs}
