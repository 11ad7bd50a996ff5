"""A lock that the file system holds: it ends with its process, and all containers that share the disk see it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from seedpack.errors import OutputError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "lock"
_HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK}
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_ATTEMPTS = 1000


class HeldError(OutputError):
    """Another run holds a lock."""


@contextlib.contextmanager
def locked(folder: Path, what: str, remedy: str) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is not there, and removed at the end where it is empty.

    Where the file system knows no locks, a lock file that is there already counts as held.

    Args:
        folder: the lock's; a holder may remove all that is in it but the lock.
        what: begins the message, as "out: another run is writing it".
        remedy: beside waiting, as "name another output".

    Raises:
        HeldError: another run holds the lock.
    """
    descriptor = _acquire(folder, what, remedy)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(folder / LOCK_FILE)
            os.rmdir(folder)
        os.close(descriptor)


def _acquire(folder: Path, what: str, remedy: str) -> int:
    if folder.is_symlink():
        raise OutputError(f"{folder}: is a link, where a run keeps what it has not finished; remove it")
    try:
        return _try_to_acquire(folder, what, remedy)
    except BaseException:  # an interrupt too, which may come between any two calls
        _remove_unheld(folder)
        raise


def _try_to_acquire(folder: Path, what: str, remedy: str) -> int:
    path = folder / LOCK_FILE
    for _ in range(_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, created = _open(path)
        except (FileNotFoundError, FileExistsError):  # its last holder is just removing the folder
            continue
        try:
            if (taken := _take(descriptor)) is False or (taken is None and not created):
                holder = os.read(descriptor, 200).decode("utf-8", "replace") or "it has just begun"
                dead = "" if taken is False else f", or if it is dead remove {folder} (this file system has no locks)"
                refusal = HeldError if taken is False else OutputError
                raise refusal(f"{what} ({holder}); wait for it, or {remedy}{dead}")
            if _is(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise OutputError(f"{folder}: cannot be locked; name another output")


def _remove_unheld(folder: Path) -> None:
    """Remove a lock file that no run holds, and its folder where that is empty."""
    path = folder / LOCK_FILE
    with contextlib.suppress(OSError):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                if _take(descriptor) and _is(path, descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)
        folder.rmdir()


def _open(path: Path) -> tuple[int, bool]:
    """Open a lock file; return whether this run has made it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, os.O_RDWR), False


def _take(descriptor: int) -> bool | None:
    """Lock an open file: return whether that worked, or None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno not in _HELD:
            raise
        return False
    return True


def _is(path: Path, descriptor: int) -> bool:
    """Return whether a path still leads to an open file, which its last holder may have removed before it was locked here."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
