"""Compile every Triton kernel for a target without a GPU, and read what came out: `python -m tests.helpers.compiled cuda 90`.

The wrappers run as ever, but launches are recorded instead of made; each kernel is compiled with the types of what it was
given. One JSON line a kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from seedpack.kernels.basis import decode_triton as basis_decode
from seedpack.kernels.basis import matmul_triton as basis_matmul
from seedpack.kernels.basis.dense_noise import DenseNoise
from seedpack.kernels.common import gpu_configs as configs
from seedpack.kernels.common import gpu_launch as launch
from seedpack.kernels.feedforward import triton as fast_feedforward
from seedpack.kernels.feedforward.reference import Tree
from seedpack.kernels.rotation import triton as rotation
from seedpack.kernels.seedlm import decode_triton as seedlm
from seedpack.kernels.seedlm import search_triton as seedlm_search
from seedpack.kernels.seedlm.code import SeedLMCode, SeedLMParts
from seedpack.kernels.trellis import decode_triton as trellis
from seedpack.kernels.trellis import matmul_triton as trellis_matmul
from seedpack.kernels.trellis import scales_triton as trellis_scales
from seedpack.kernels.trellis import search_triton as trellis_search
from seedpack.kernels.trellis.code import TrellisCode
from seedpack.kernels.trellis.search_reference import Boundary, zero_boundary

OPTIONS = ("num_warps", "num_stages", "maxnreg")
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int16: "*i16",
    torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
COLUMNS, ROWS, MANY_ROWS = 1536, 128, 16384


def trellis_parts(code_bits: float, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, 1, int(COLUMNS * code_bits) // 8, dtype=torch.uint8), torch.ones(rows)


def seedlm_weight(block: int, rank: int, rows: int = ROWS) -> Any:
    blocks = -(-COLUMNS // block)
    seeds = torch.zeros(rows, blocks, 2, dtype=torch.uint8)
    codes = torch.zeros(rows, 1, -(-blocks * 4 * (rank + 1) // 8), dtype=torch.uint8)
    parts = SeedLMParts(seeds, codes, torch.zeros(1, dtype=torch.int8))
    return seedlm.regenerated(parts, SeedLMCode(16, block, rank), COLUMNS)


def launches() -> dict[str, Callable[[], object]]:
    """A name for each kernel in each form that matters."""
    found: dict[str, Callable[[], object]] = {
        "rotation": lambda: rotation.mix(torch.zeros(2, COLUMNS), None),
        "rotation in lanes": lambda: trellis_matmul.mixed_lanes(
            torch.zeros(2, 4096).bfloat16(), torch.ones(4096), TrellisCode(4, 16, 5)
        ),
        "activations of 8 bits": lambda: trellis_matmul.eight_bits(torch.zeros(2, COLUMNS // 256, 8, 32), 1),
        "trellis factors": lambda: trellis_scales.prepare(
            torch.zeros(ROWS, dtype=torch.int16),
            torch.zeros(1, dtype=torch.int8),
            torch.zeros(1, COLUMNS // 2, 1, dtype=torch.uint8),
            torch.ones(COLUMNS),
        ),
        "trellis factors, no balance": lambda: trellis_scales.prepare(
            torch.zeros(ROWS, dtype=torch.int16), torch.zeros(1, dtype=torch.int8), None, torch.ones(COLUMNS)
        ),
    }
    weights: dict[str, Callable[[], Any]] = {
        f"trellis-{k}": lambda k=k: trellis.regenerated(*trellis_parts(k), TrellisCode(k, 16, 5), COLUMNS)
        for k in (2, 3, 4)
    }
    weights["trellis-2x3"] = lambda: trellis.regenerated(*trellis_parts(3), TrellisCode(3, 16, 5, weights=2), COLUMNS)
    weights["trellis-4 zeros"] = lambda: trellis.regenerated(
        *trellis_parts(4), TrellisCode(4, 16, 5, tail_biting=False), COLUMNS
    )
    weights |= {f"seedlm-{b}x{r}": lambda b=b, r=r: seedlm_weight(b, r) for b, r in ((8, 3), (12, 4))}
    for name, weight in weights.items():
        for dtype in (torch.float32, torch.float16):
            kind = str(dtype).removeprefix("torch.")
            found[f"{name} matmul {kind}"] = lambda w=weight, d=dtype: launch.matmul(torch.zeros(300, COLUMNS), w(), d)
            found[f"{name} transposed {kind}"] = lambda w=weight, d=dtype: launch.matmul_transposed(
                torch.zeros(300, ROWS), w(), d
            )
        found[f"{name} dense"] = lambda w=weight: launch.dense(w(), torch.float32)
        if name.startswith("seedlm"):
            for tokens in (1, 8):
                found[f"{name} {tokens} tokens"] = lambda w=weight, t=tokens: launch.few_tokens(
                    torch.zeros(t, COLUMNS), w(), torch.float16
                )
    for generator in ("philox", "squirrel5"):
        coefs, basis = torch.ones(1, 128), DenseNoise(generator, 7)
        name = f"basis {generator}"
        found[f"{name} dense"] = lambda b=basis, c=coefs: basis_decode.dense(c, b, ROWS, COLUMNS, torch.arange(ROWS))
        for tokens in (1, 8, 300):
            found[f"{name} {tokens} tokens"] = lambda b=basis, c=coefs, t=tokens: basis_matmul.matmul(
                torch.zeros(t, COLUMNS, dtype=torch.float16), c, b, ROWS
            )
        found[f"{name} transposed"] = lambda b=basis, c=coefs: basis_matmul.matmul_transposed(
            torch.zeros(300, ROWS, dtype=torch.float16), c, b, COLUMNS
        )
        found[f"{name} gradient"] = lambda b=basis: basis_matmul.grad_coefs(
            torch.zeros(300, ROWS), torch.zeros(300, COLUMNS), 1, 128, b
        )
    for k, per_window in ((2, 1), (3, 1), (4, 1), (2, 2), (2.5, 2), (3, 2)):
        for int8 in (False, True):
            for tokens in (1, 8):
                name = f"trellis-{per_window}x{k} {tokens} tokens{' int8' if int8 else ''}"
                found[name] = lambda k=k, v=per_window, i=int8, t=tokens: trellis_matmul.few_tokens(
                    trellis_matmul.in_lanes(torch.zeros(t, COLUMNS), TrellisCode(k, 16, 5, weights=v)),
                    t,
                    *trellis_parts(k, MANY_ROWS),
                    TrellisCode(k, 16, 5, weights=v),
                    torch.bfloat16,
                    i,
                )
    for k, state_bits, survivors, per_window in (
        (1, 16, 12, 1),
        (2, 16, 11, 1),
        (3, 16, 10, 1),
        (4, 16, 9, 1),
        (4, 16, 12, 1),
        (4, 18, 14, 1),
        (8, 16, 8, 1),
        (2, 16, 12, 2),
        (3, 16, 10, 2),
        (2.5, 16, 11, 2),
        (2, 20, 16, 2),
    ):
        found[f"search {per_window}x{k} of {state_bits} keeping {survivors}"] = (
            lambda k=k, s=state_bits, m=survivors, w=per_window: walk(k, s, m, w)
        )
    for places, rank in ((8, 3), (12, 4), (64, 8), (256, 16)):
        q = torch.zeros(rank, 1 << 12, max(16, places), dtype=torch.float16)
        found[f"seedlm search {places}x{rank}"] = lambda q=q: seedlm_search.largest_energies(q, q[0, :100])
    single = {
        "trellis": lambda: trellis.regenerated(*trellis_parts(4, 1), TrellisCode(4, 16, 1), COLUMNS),
        "seedlm": lambda: seedlm_weight(8, 3, 1),
        "basis": lambda: basis_decode.regenerated(torch.ones(1, 4), DenseNoise("squirrel5", 1), 1, COLUMNS),
    }
    for name, weight in single.items():
        for tokens in (1, 16):
            found[f"{name} of one row {tokens} tokens"] = lambda w=weight, t=tokens: launch.matmul(
                torch.zeros(t, COLUMNS), w(), torch.float16
            )
        found[f"{name} of one row transposed"] = lambda w=weight: launch.matmul_transposed(
            torch.zeros(1, 1), w(), torch.float16
        )
        found[f"{name} of one row dense"] = lambda w=weight: launch.dense(w(), torch.float32)
    lanes = torch.zeros(1, 1, 8, 32)
    found["trellis few of one row"] = lambda: trellis_matmul.few_tokens(
        lanes, 1, *trellis_parts(4, 1), TrellisCode(4, 16, 1, tail_biting=False), torch.float16
    )
    for per_window in (1, 2):
        found[f"activations of 8 bits, one group, {per_window}"] = lambda w=per_window: trellis_matmul.eight_bits(
            lanes, w
        )
    found["search of one row"] = lambda: trellis_search.walk(torch.zeros(1, 40, 1), TrellisCode(4, 16, 1), 9)
    found["search from zeros"] = lambda: trellis_search.walk(
        torch.zeros(ROWS, 48, 1), TrellisCode(3, 16, 1), 10, zero_boundary(torch.zeros(ROWS))
    )
    for activation, dtype in (("relu", torch.float32), ("gelu", torch.float16), ("silu", torch.bfloat16)):
        tables = [
            torch.zeros(shape, dtype=dtype) for shape in ((7, 768), (7,), (192, 768), (8, 24), (192, 768), (8, 768))
        ]
        found[f"fast feedforward {activation}"] = lambda t=tables, a=activation: fast_feedforward.forward(
            torch.zeros(2, 768, dtype=t[0].dtype), Tree(*t), a
        )
    found["gradient of one"] = lambda: basis_matmul.grad_coefs(
        torch.zeros(1, 1), torch.zeros(1, 8), 1, 1, DenseNoise("philox", 1)
    )
    return found


def walk(code_bits: float, state_bits: int, survivors: int, weights: int) -> torch.Tensor:
    """Walk over tail-biting rows."""
    code = TrellisCode(code_bits, state_bits, 5, weights=weights)
    symbols = torch.zeros(ROWS, code.memory_symbols, dtype=torch.int64)
    boundary = Boundary(symbols[:, 0], symbols, symbols[:, :1])
    return trellis_search.walk(torch.zeros(ROWS, COLUMNS // weights, weights), code, survivors, boundary)


def signature(value: object) -> Any:
    """Triton's type of a run-time argument."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, tuple):
        return tuple(signature(item) for item in value)
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    assert isinstance(value, float)
    return "fp32"


def divisible(value: object, path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Where arguments are pointers, aligned, or multiples of 16."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from divisible(item, (*path, i))
    elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
        yield path


def source_of(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    constants = constants | {
        name: 1 for name, value in values.items() if type(value) is int and value == 1
    }  # as Triton does
    types = {name: "constexpr" if name in constants else signature(values[name]) for name in kernel.arg_names}
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    attributes = {
        path: [["tt.divisibility", 16]]
        for name in kernel.arg_names
        if name not in constants
        for path in divisible(values[name], places[name])
    }
    return ASTSource(kernel, types, {places[name]: value for name, value in constants.items()}, attributes)


def main(backend: str, arch: str, only: str = "") -> None:
    warnings.simplefilter("ignore")
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 32 if backend == "cuda" else 64)
    configs.is_nvidia = lambda device: backend == "cuda"
    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: recorded.append((kernel, args, kwargs))
    for name, run in launches().items():
        if only not in name:
            continue
        recorded.clear()
        run()
        kernel, args, kwargs = recorded[-1]
        options = {key: value for key, value in kwargs.items() if key in OPTIONS}
        constants = {key: value for key, value in kwargs.items() if key not in OPTIONS}
        built = triton.compile(source_of(kernel, args, constants), target=target, options=options)
        found = {
            "name": name,
            "shared": built.metadata.shared,
            "constants": {k: v for k, v in constants.items() if isinstance(v, int)},
            **options,
        }
        print(json.dumps(found | (cuda_figures(built) if backend == "cuda" else amd_figures(built))), flush=True)


def amd_figures(built: Any) -> dict[str, int]:
    """Vector registers, and those spilled to memory (scalar ones are spilled into vector registers)."""
    text = built.asm["amdgcn"]
    spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    assert spills and registers
    return {"registers": int(registers[1]), "spills": sum(map(int, spills))}


def cuda_figures(built: Any) -> dict[str, float]:
    """Registers, instructions that move spilled ones, instructions of the longest loop."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers
    labels: dict[str, int] = {}
    instructions: list[str] = []
    an_edge = 0.0
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+([^/]*\S)", line):
            instructions.append(instruction[1])
    loop = 0
    for i, text in enumerate(instructions):
        if (to := re.search(r"\bBRA\b.*?(\.L\w+)", text)) and labels.get(to[1], i + 1) <= i:
            body = instructions[labels[to[1]] : i + 1]
            loop = max(loop, len(body))
            edges = sum("IDP" in instruction for instruction in body)  # the trellis's search has one product an edge
            an_edge = min(an_edge or len(body), len(body) / edges) if edges >= 64 else an_edge
    spills = sum(bool(re.search(r"\b(STL|LDL)\b", text)) for text in instructions)
    return {
        "registers": int(registers[1]),
        "spills": spills,
        "instructions": len(instructions),
        "loop": loop,
        "an_edge": an_edge,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
