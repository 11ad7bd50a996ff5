"""The memory that is free, of a machine and of a container."""

from __future__ import annotations

from pathlib import Path

from seedpack.memory import free_bytes


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:  8000 kB\n"}


def test_the_machine(tmp_path: Path) -> None:
    assert free_bytes(system(tmp_path, MACHINE)) == 8000 * 1024
    assert free_bytes() > 1 << 20
    assert free_bytes(tmp_path / "nothing") > 1 << 20


def test_a_container_of_version_2(tmp_path: Path) -> None:
    groups = {
        "proc/self/cgroup": "0::/pod/app\n",
        "sys/fs/cgroup/pod/app/memory.max": "max\n",
        "sys/fs/cgroup/pod/app/memory.current": "100\n",
        "sys/fs/cgroup/pod/memory.max": "5000\n",
        "sys/fs/cgroup/pod/memory.current": "3000\n",
        "sys/fs/cgroup/pod/memory.stat": "anon 1000\ninactive_file 700\n",
    }
    assert free_bytes(system(tmp_path, MACHINE | groups)) == 5000 - 3000 + 700


def test_a_container_of_version_1(tmp_path: Path) -> None:
    """The path is the host's, and what is mounted is the container's own group."""
    groups = {
        "proc/self/cgroup": "9:cpu:/\n4:memory,x:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "4500\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
    }
    assert free_bytes(system(tmp_path, MACHINE | groups)) == 0
    (tmp_path / "sys/fs/cgroup/memory/memory.usage_in_bytes").write_text("1500\n")
    assert free_bytes(tmp_path) == 4000 - 1500 + 200
