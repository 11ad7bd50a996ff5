"""The product of few tokens on the CPU, in integers: each way of multiplying bytes, odd shapes, changed parts, companions."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
import threading
import weakref
from time import perf_counter

import llvmlite.binding as llvm
import pytest
import torch
from llvmlite import ir

from seedpack.codecs.seedlm import SeedLMCodec
from seedpack.dtypes import TORCH_DTYPES
from seedpack.kernels.common import few_tokens as calls
from seedpack.kernels.common.byte_dots import way
from seedpack.kernels.common.companions import Thread
from seedpack.kernels.common.crowd import Crowd
from seedpack.kernels.common.few_tokens import Prepared
from seedpack.kernels.trellis.few_tokens_cpu import emit_dots
from tests.helpers.marks import slow, slow_but
from tests.helpers.products import LIMIT, FewTokens, error, few_tokens, few_tokens_of_seedlm
from tests.helpers.ways import outcome

# k, L, rows, columns, weights per window: rows shorter than a load, odd widths, prime factors, rows of several groups, windows
# of 18 and 20 bits
SHAPES = [
    (4, 16, 40, 576, 1), (2, 16, 35, 300, 2), (3, 18, 33, 264, 1), (3, 16, 17, 515, 2), (2, 16, 35, 300, 1),
    (4, 16, 17, 515, 1), (1, 16, 7, 37, 1), (5, 20, 9, 64, 1), (6, 16, 130, 200, 1), (7, 16, 9, 777, 1), (8, 16, 5, 1, 1),
    (4, 18, 10, 1000, 1), (1, 16, 7, 37, 2), (2, 20, 9, 1000, 2), (3, 20, 130, 64, 2), (3, 16, 40, 576, 2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer of another test is a companion."""
    monkeypatch.setattr(calls, "_thread", Thread())


@pytest.mark.parametrize(
    "shape", [*SHAPES[:4], *(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES[4:])], ids=str
)
@pytest.mark.parametrize("tail_biting", [True, False])
@pytest.mark.parametrize("tokens", slow_but([1, 3], [1, 2, 3, 8]))
def test_product_is_that_of_rounded_activations(
    shape: tuple[int, int, int, int, int], tail_biting: bool, tokens: int, poison: None
) -> None:
    weight = few_tokens(*shape[:4], tail_biting, bias=tokens > 1, weights=shape[4])
    x = torch.randn(tokens, shape[3])
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype)
        found = weight.product(given)
        assert found is not None and found.dtype == dtype and found.shape == (tokens, shape[2])
        assert error(found, weight.expected(given, 8)) < LIMIT[dtype]


# K, C, P, rows, columns: the paper's sizes, states of fewer bits, blocks that do not fill four bytes, rows of several groups,
# rows shorter than eight blocks, fields that begin within a byte
SEEDLM = [
    (16, 8, 3, 40, 576),
    (16, 12, 4, 17, 515),
    (13, 7, 3, 33, 700),
    (12, 8, 3, 9, 77),
    (9, 6, 2, 5, 1000),
    (16, 8, 3, 7, 5),
]


@pytest.mark.parametrize(
    "sizes", [*SEEDLM[:3], *(pytest.param(s, marks=pytest.mark.slow) for s in SEEDLM[3:])], ids=str
)
@pytest.mark.parametrize("tokens", slow_but([1, 3], [1, 2, 3, 4, 8]))
@pytest.mark.parametrize(("planes", "limit"), [(1, 0.015), (2, 5e-5)])
@pytest.mark.skipif(way() != "vnni512", reason="this processor has no shifts of bytes")
def test_product_of_seedlm(
    sizes: tuple[int, int, int, int, int], tokens: int, planes: int, limit: float, poison: None
) -> None:
    *form, rows, columns = sizes
    weight = few_tokens_of_seedlm(SeedLMCodec(*form), rows, columns, planes)
    x = torch.randn(tokens, columns)
    for dtype in (torch.float32, torch.bfloat16):
        found = weight.product(x.to(dtype)) if tokens <= weight.product.most_tokens else None
        if found is not None:
            assert found.dtype == dtype and found.shape == (tokens, rows)
            assert error(found, weight.expected(x.to(dtype))) < max(
                limit, LIMIT[dtype] if dtype != torch.float32 else 0
            )


@pytest.mark.skipif(way() != "vnni512" or sys.platform == "win32", reason="no shifts of bytes, or no mprotect")
def test_seedlm_reads_nothing_behind_the_last_row() -> None:
    """Rows of fewer bytes than a load: the parts lie at the very end of a file that is mapped, behind which nothing may be read."""
    weight = few_tokens_of_seedlm(SeedLMCodec(), 9, 5, 2)
    parts = {}
    for name, part in weight.parts.items():
        memory = torch.frombuffer(mmap.mmap(-1, 2 * mmap.PAGESIZE), dtype=torch.uint8)
        place = memory[mmap.PAGESIZE - part.nbytes : mmap.PAGESIZE].view(part.dtype).view(part.shape)
        parts[name] = place.copy_(part)
        assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.data_ptr() + mmap.PAGESIZE), mmap.PAGESIZE, 0)
    product = weight.codec.prepare(parts, (9, 5), weight.bias, 2)
    x = torch.randn(2, 5)
    found = None if product is None else product(x)
    assert found is not None and error(found, weight.expected(x)) < 5e-5


def test_seedlm_of_other_sizes_has_no_product_of_bytes() -> None:
    for form in ((18, 6, 2), (8, 8, 3), (16, 17, 3)):  # states of three bytes or of one, sequences of more than 64 bits
        codec = SeedLMCodec(*form)
        parts = {
            name: torch.ones(shape, dtype=TORCH_DTYPES[dtype]) for name, (dtype, shape) in codec.parts((4, 40)).items()
        }
        assert codec.prepare(parts, (4, 40), None, 2) is None


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(("code_bits", "weights"), [(5, 1), (3, 2)])
def test_two_planes_are_sixteen_bits(tokens: int, code_bits: int, weights: int, poison: None) -> None:
    weight = few_tokens(code_bits, 16, 33, 600, planes=2, weights=weights)
    x = torch.randn(2, tokens, 300)[:, :, :300].reshape(tokens, 600)
    found = weight.product(x)
    assert found is not None and error(found, weight.expected(x)) < 4e-5 * weights**2
    assert weight.product.most_tokens == 4


def test_what_is_not_finite_stays_so() -> None:
    weight = few_tokens(4, 16, 20, 600)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(2, 600)
        x[1, 5] = bad
        found = weight.product(x)
        assert found is not None and found[0].isfinite().all() and found[1].isnan().all()
    nothing = weight.product(torch.zeros(1, 600))
    assert nothing is not None and weight.bias is not None and torch.equal(nothing[0], weight.bias)


@pytest.mark.parametrize("part", ["scales", "exponent", "balance", "bias"])
def test_changed_parts_are_seen(part: str) -> None:
    weight = few_tokens(4, 16, 200, 576)
    x = torch.randn(1, 576)
    assert weight.product(x) is not None
    changed = weight.bias if part == "bias" else weight.parts[part]
    assert changed is not None
    changed[-1] += 1  # in place
    assert weight.product(x) is None


@pytest.mark.parametrize("way", slow("vnni512", "vnni256", "avx2", "neon", "any"))
def test_every_way_gives_the_same(way: str) -> None:
    """Each on this machine, by leaving out features of its processor; that of ARM with its instruction emulated."""
    found = outcome(way)
    if not found:
        pytest.skip(f"this processor cannot multiply bytes by {way}")
    name, worst, differing = found.split()
    assert name == way and float(worst) < LIMIT[torch.float32] and differing == "0"


@pytest.mark.parametrize("weights", [1, 2])
def test_compiles_for_arm(weights: int) -> None:
    """With a table look-up, a shift, a mask, a multiply–add and one product of bytes for four windows, and nothing spilled."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = "aarch64-linux-gnu"
    words = [ir.IntType(64)] * 10
    function = ir.Function(module, ir.FunctionType(ir.FloatType(), words), "row")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(emit_dots(builder, "neon", 4, weights, 16, 1, *function.args)[0])
    machine = llvm.Target.from_triple(module.triple).create_target_machine(features="+neon,+dotprod", opt=3)
    parsed = llvm.parse_assembly(str(module))
    builder_of_passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    builder_of_passes.getModulePassManager().run(parsed, builder_of_passes)
    lines = [line.split() for line in machine.emit_assembly(parsed).splitlines() if line.startswith("\t")]
    names = [line[0] for line in lines]
    assert names.count("sdot") == names.count("tbl") == 16  # a step takes 64 windows
    first, last = (index for index in (names.index("sdot"), len(names) - 1 - names[::-1].index("sdot")))
    assert sum(name in ("str", "stp") for name in names[first:last]) == 0
    assert last - first <= 64 * 2


def companions(count: int) -> list[FewTokens]:
    """Layers that have been called one after the other on the same activations, twice."""
    weights = [few_tokens(4, 16, rows, 576) for rows in (40, 24, 33)[:count]]
    for _ in range(2):
        x = torch.randn(1, 576)
        for weight in weights:
            weight.product(x)
    return weights


def leader(weights: list[FewTokens]) -> Prepared:
    product = weights[0].product
    assert isinstance(product, Prepared)
    return product


def test_companions_are_computed_together() -> None:
    weights = companions(3)
    assert len(leader(weights).members) == 3
    x = torch.randn(1, 576)
    for weight in weights:
        found = weight.product(x)
        assert found is not None and error(found, weight.expected(x, 8)) < LIMIT[torch.float32]


@pytest.mark.parametrize("where", ["in place", "elsewhere"])
def test_other_activations_part_companions(where: str) -> None:
    weights = companions(2)
    x = torch.randn(1, 576)
    weights[0].product(x)
    x = x.mul_(2) if where == "in place" else torch.randn(1, 576)
    found = weights[1].product(x)
    assert found is not None and error(found, weights[1].expected(x, 8)) < LIMIT[torch.float32]
    if where == "in place":
        assert leader(weights).members == [leader(weights)]


def test_companions_that_are_not_called_are_parted() -> None:
    weights = companions(2)
    weights[0].product(torch.randn(1, 576))
    weights[0].product(torch.randn(1, 576))
    assert leader(weights).members == [leader(weights)]


def test_companions_whose_parts_changed_are_not_computed() -> None:
    weights = companions(2)
    weights[1].parts["scales"][0] += 1
    x = torch.randn(1, 576)
    assert weights[0].product(x) is None  # prepared anew, alone
    assert weights[1].product(x) is None


def test_threads_have_companions_of_their_own() -> None:
    weights = companions(2)
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = torch.randn(1, 576, generator=generator)
            for weight in weights:
                found = weight.product(x)
                if found is None or error(found, weight.expected(x, 8)) > LIMIT[torch.float32]:
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_products_keep_to_their_thread_where_cores_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd, threads, run = Crowd(), [], calls._run

    def watched(*arguments: int) -> int:
        threads.append(arguments[4])
        return run(*arguments)

    monkeypatch.setattr(calls, "_crowd", crowd)
    monkeypatch.setattr(calls, "_run", watched)
    monkeypatch.setattr(calls, "torch_thread_count", lambda: 2)
    monkeypatch.setattr(calls, "too_long", lambda work: 10.0)
    weight = few_tokens(4, 16, 400, 576)
    x = torch.randn(1, 576)
    first = weight.product(x)  # called twice, as the thread had no room
    crowd.late(perf_counter(), 20.0)
    crowd.late(perf_counter(), 20.0)  # not the first
    second = weight.product(x)
    crowd.until = 0.0
    weight.product(x)
    assert threads == [2, 2, 1, 2] and first is not None and second is not None and torch.equal(first, second)


def test_numbas_threads_serve_where_torch_has_none(monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    monkeypatch.setattr(calls, "parallel_region", lambda: 0)
    monkeypatch.setattr(calls, "torch_thread_count", lambda: 2)
    weight = few_tokens(4, 16, 400, 576)
    x = torch.randn(3, 576)
    found = weight.product(x)
    assert found is not None and error(found, weight.expected(x, 8)) < LIMIT[torch.float32]


def test_a_layer_that_is_gone_leaves_no_memory() -> None:
    weights = companions(1)
    gone = weakref.ref(weights[0].product)
    del weights
    gc.collect()
    assert gone() is None
