"""A token's leaf and its product, of every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seedpack.errors import BackendError
from seedpack.kernels import dispatch
from seedpack.kernels.feedforward import Tree, fast_feedforward, leaves
from seedpack.kernels.feedforward import cpu as cpu_kernel
from tests.helpers.products import error

SIZES = [(1, 5, 3, 0, 1), (4, 37, 11, 3, 5), (70, 130, 20, 2, 17), (9, 16, 600, 1, 3)]


def tree_of(columns: int, outputs: int, depth: int, width: int) -> Tree:
    count = 2**depth
    return Tree(
        torch.randn(max(1, count - 1), columns), torch.randn(max(1, count - 1)), torch.randn(count * width, columns),
        torch.randn(count, width), torch.randn(count * width, outputs), torch.randn(count, outputs),
    )  # fmt: skip


def by_hand(x: Tensor, tree: Tree, activation: str) -> tuple[list[int], Tensor]:
    """Token by token as the definition says, in float64; nodes and leaves counted in one line of numbers."""
    nodes, node_bias, leaf_in, in_bias, leaf_out, out_bias = (value.double() for value in tree)  # type: ignore[union-attr]
    width, chosen, out = in_bias.shape[1], [], []
    for token in x.double():
        node = 0
        while node < len(in_bias) - 1:
            node = 2 * node + (2 if float(token @ nodes[node] + node_bias[node]) > 0 else 1)
        leaf = node - (len(in_bias) - 1)
        rows = slice(leaf * width, (leaf + 1) * width)
        hidden = getattr(torch.nn.functional, activation)(leaf_in[rows] @ token + in_bias[leaf])
        chosen.append(leaf)
        out.append(hidden @ leaf_out[rows] + out_bias[leaf])
    return chosen, torch.stack(out)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize(("tokens", "columns", "outputs", "depth", "width"), SIZES)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_backends(
    backend: Any, tokens: int, columns: int, outputs: int, depth: int, width: int, activation: str, poison: None
) -> None:
    x, tree = torch.randn(tokens, columns), tree_of(columns, outputs, depth, width)
    chosen, exact = by_hand(x, tree, activation)
    assert leaves(x, tree).tolist() == chosen
    assert depth == 0 or tokens == 1 or len(set(chosen)) > 1
    found = fast_feedforward(x.view(1, tokens, columns), tree, activation, backend=backend)
    assert found.shape == (1, tokens, outputs) and error(found[0], exact) < 1e-6
    assert fast_feedforward(x[:0], tree, activation, backend=backend).shape == (0, outputs)


def test_many_tokens_on_the_cpu(poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaf by leaf on all cores, as one by one."""
    x, tree = torch.randn(300, 40), tree_of(40, 24, 4, 6)
    alone = fast_feedforward(x, tree, "gelu", backend="cpu")
    monkeypatch.setattr(cpu_kernel, "FEW_VALUES", 0)
    assert torch.equal(fast_feedforward(x, tree, "gelu", backend="cpu"), alone)


def test_tensors_without_an_address_of_their_own() -> None:
    """The compiled kernel takes addresses: of strided tables it makes copies, of other kinds of tensors none are taken."""

    class Wrapped(Tensor):
        pass

    x, tree = torch.randn(4, 12), tree_of(12, 7, 2, 3)
    exact = fast_feedforward(x, tree, "gelu", backend="cpu")
    strided = Tree(*(torch.stack((-value, value), -1)[..., 1] for value in tree))  # type: ignore[operator, arg-type]
    assert not strided.leaf_in.is_contiguous()  # type: ignore[union-attr]
    assert torch.equal(fast_feedforward(x.T.contiguous().T, strided, "gelu", backend="cpu"), exact)
    with pytest.raises(BackendError, match="plain float32 tensors alone"):
        fast_feedforward(x.as_subclass(Wrapped), tree, "gelu", backend="cpu")
    dispatch._warn_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match="'cpu' passed over, it takes plain float32 tensors alone"):
        found = fast_feedforward(x.as_subclass(Wrapped), tree, "gelu")
    torch.testing.assert_close(found.as_subclass(Tensor), exact)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(backend: Any, dtype: torch.dtype, poison: None) -> None:
    x, tree = torch.randn(6, 32).to(dtype), Tree(*(value.to(dtype) for value in tree_of(32, 8, 2, 4)))  # type: ignore[union-attr]
    _, exact = by_hand(x, tree, "silu")
    found = fast_feedforward(x, tree, "silu", backend=backend)
    assert found.dtype == dtype and error(found, exact) < 0.02
    with pytest.raises(BackendError, match="plain float32 tensors alone"):
        fast_feedforward(x, tree, "silu", backend="cpu")


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_nan_stays_nan(backend: Any) -> None:
    x, tree = torch.randn(3, 16), tree_of(16, 5, 2, 3)
    x[1, 4] = float("nan")
    for activation in ("relu", "gelu", "silu"):
        found = fast_feedforward(x, tree, activation, backend=backend)
        assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_tables_that_are_functions() -> None:
    x, tree = torch.randn(5, 16), tree_of(16, 5, 2, 3)
    looked_up = tree._replace(leaf_in=lambda index: tree.leaf_in[index])  # type: ignore[index]
    exact = fast_feedforward(x, tree, "relu", backend="reference")
    for backend in ("auto", "reference"):
        assert torch.equal(fast_feedforward(x, looked_up, "relu", backend=backend), exact)
    with pytest.raises(BackendError, match="backend 'cpu' cannot run: a table is a function"):
        fast_feedforward(x, looked_up, "relu", backend="cpu")


def test_compiled_model_sees_one_operator() -> None:
    tree = tree_of(16, 5, 2, 3)
    run = torch.compile(lambda x: fast_feedforward(x * 1, tree, "relu"), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 16)
    with torch.no_grad():
        assert torch.equal(run(x), fast_feedforward(x, tree, "relu"))
