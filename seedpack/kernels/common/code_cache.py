"""Keep compiled code on disk as Numba does, but never let that stop the work, and run no damaged code.

Numba's own cache raises whatever goes wrong: no folder that can be written, a full disk, a file that was cut off. Here the
code is then compiled anew, a warning says so once, and a damaged file is replaced. Numba's private names stand in this file
alone.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

from numba import types
from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

KERNELS = Path(__file__).parents[1]
DIGEST_BYTES = 32
_unsaid = threading.Lock()  # taken for good by the first that warns


def keep_on_disk(dispatcher: Any, variant: str) -> None:
    """Keep the code of a function that Numba compiles, under the name of a variant: options are not in Numba's own key."""
    function = dispatcher.py_func
    try:
        dispatcher._cache = _Cache(function, variant)
    except (OSError, RuntimeError) as error:  # no folder can be written
        _warn(_folder(function), error)


def compile_at(function: Callable[[int], int], variant: str) -> Any:
    """Compile a function of a whole number, which returns one, to be called at its `address`; kept on disk."""
    signature = (types.int64,), types.int64
    compiled: Any = CFunc(function, signature, {}, {"nopython": True, "error_model": "numpy"})
    try:
        compiled._cache = _Cache(function, variant)
    except (OSError, RuntimeError) as error:
        _warn(_folder(function), error)
    compiled.compile()
    return compiled


def _folder(function: Callable[..., Any]) -> str | Path:
    """Return where the code of a function would be kept."""
    return getattr(config, "CACHE_DIR", "") or Path(function.__code__.co_filename).parent / "__pycache__"


def _warn(folder: str | Path, error: Exception) -> None:
    """Say once per process that the cache does not serve."""
    if _unsaid.acquire(blocking=False):
        warnings.warn(
            f"compiled kernels could not be read from, or kept in, {folder} ({type(error).__name__}: {error}); they are "
            "compiled anew in each process that cannot. Set NUMBA_CACHE_DIR to a folder that can be written, or delete that one",
            RuntimeWarning,
            stacklevel=2,
        )


@cache
def _sources() -> str:
    """Return the digest of all kernels: code of other modules goes into a function's own, at whose module alone Numba looks."""
    return sha256(b"".join(path.read_bytes() for path in sorted(KERNELS.rglob("*.py")))).hexdigest()


def _require_whole(path: str) -> None:
    """Refuse a file that does not end in the digest of what stands before it."""
    content = Path(path).read_bytes()
    if sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        raise ValueError(f"{Path(path).name} is damaged")


class _File(IndexDataCacheFile):
    """The index and the data of one function, each file with its digest behind it, where unpickling does not look."""

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[BinaryIO]:
        content = BytesIO()
        yield content
        with super()._open_for_write(filepath) as file:
            file.write(content.getvalue() + sha256(content.getvalue()).digest())

    def _data_name(self, number: int) -> str:
        """Give what is saved a name that no other process takes: of two at once one would run the other's code."""
        return f"{token_hex(8)}.{super()._data_name(number)}"

    def _load_index(self) -> Any:
        with suppress(FileNotFoundError):
            _require_whole(self._index_path)
        return super()._load_index()

    def _load_data(self, name: str) -> Any:
        _require_whole(self._data_path(name))
        return super()._load_data(name)


class _Implementation(CompileResultCacheImpl):
    def __init__(self, variant: str, function: Callable[..., Any]):
        self._variant = variant
        super().__init__(function)

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        return f"{super().get_filename_base(fullname, abiflags)}-{self._variant}"


class _Cache(FunctionCache):
    def __init__(self, function: Callable[..., Any], variant: str):
        self._impl_class: Any = partial(_Implementation, variant)
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp(), _sources()
        self._cache_file = _File(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # whatever unpickling damaged data raises
            with suppress(Exception):
                self.flush()
            _warn(self.cache_path, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn(self.cache_path, error)
