"""The trellis types of ik_llama.cpp, IQ2_KT, IQ3_KT and IQ4_KT, by its own quantisers.

They are compiled from a checkout of it that lies elsewhere: the environment variable IK_LLAMA names it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lib import models, peers

TYPES = {"IQ2_KT": 153, "IQ3_KT": 154, "IQ4_KT": 155}
SOURCES = ("ggml.c", "ggml-quants.c", "ggml-aarch64.c", "iqk/iqk_quantize.cpp")
FLAGS = ("-O3", "-march=native", "-fPIC", "-DGGML_USE_IQK_MULMAT", "-D_GNU_SOURCE", "-DNDEBUG")


def at_hand() -> bool:
    """Return whether a checkout is named."""
    return bool(os.environ.get("IK_LLAMA"))


def version() -> str:
    """Return the checkout's commit."""
    command = ["git", "-C", os.environ["IK_LLAMA"], "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "of unknown commit"


class _Memory(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@functools.cache
def _library() -> ctypes.CDLL:
    """Compile the quantisers alone (products are not called), once."""
    target = models.CACHE / "ik_llama" / "quantisers.so"
    if not target.is_file():
        source = Path(os.environ["IK_LLAMA"]) / "ggml"
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = []
        for name in SOURCES:
            objects.append(target.with_name(f"{Path(name).stem}.o"))
            compiler = ["g++", "-std=c++17"] if name.endswith("cpp") else ["gcc"]
            include = [f"-I{source / 'include'}", f"-I{source / 'src'}"]
            command = [*compiler, *FLAGS, *include, "-c", str(source / "src" / name), "-o", str(objects[-1])]
            subprocess.run(command, check=True)
        command = ["g++", "-shared", "-o", str(target), *map(str, objects), "-Wl,--unresolved-symbols=ignore-all"]
        subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target), os.RTLD_LAZY)
    library.ggml_init.argtypes = [_Memory]
    library.ggml_init.restype = ctypes.c_void_p
    library.ggml_init(_Memory(1 << 20, None, True))  # its tables
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    return library


def trellis(weight: Tensor, kind: str, importance: Tensor) -> tuple[Tensor, float]:
    """Return a weight as a type rebuilds it with an importance of each column [in], and its bits, scales of rows included.

    Blocks of 256 run over rows that lie end to end, as many as are a multiple of both: ik_llama.cpp has other types for rows that
    are none.
    """
    library = _library()
    source, row, matrix = peers.in_blocks(weight, importance)
    assert matrix is not None
    quantise, rebuild = getattr(library, f"quantize_{kind.lower()}"), getattr(library, f"dequantize_row_{kind.lower()}")
    quantise.restype, rebuild.restype = ctypes.c_size_t, None
    quantise.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    rebuild.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    rows, size = source.numel() // row, library.ggml_row_size(TYPES[kind], row)
    packed, found = torch.empty(rows, size, dtype=torch.uint8), torch.empty(rows, row)
    source = source.view(rows, row)

    def one(index: int) -> None:
        quantise(source[index].data_ptr(), packed[index].data_ptr(), 1, row, matrix.data_ptr(), None)
        rebuild(packed[index].data_ptr(), found[index].data_ptr(), row)

    one(0)  # alone: it makes tables
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, range(1, rows)))
    return found.flatten()[: weight.numel()].view(weight.shape).to(weight.dtype), 8 * size / row
