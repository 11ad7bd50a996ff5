"""Layers of noise times coefficients: their scale at the start, and their product beside making the weight first."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import seedpack.nn as snn
from benchmarks.lib import report
from seedpack.kernels.basis import noise_basis

BLOCKS, WIDTH, HEADS, TOKENS = 12, 256, 4, 64
ROWS, COUNT = 4096, 128


class Layer(nn.Module):
    """A transformer block with norms before, of either kind of linear layer."""

    def __init__(self, linear: Callable[[int, int], nn.Module]):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return y


def scales(linear: Callable[[int, int], nn.Module], seed: int) -> tuple[float, float]:
    """Standard deviations of what the blocks add to the stream, and of the gradient at their input."""
    torch.manual_seed(seed)
    blocks = nn.Sequential(*(Layer(linear) for _ in range(BLOCKS)))
    x = torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = blocks(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    assert x.grad is not None
    return (y - x).std().item(), x.grad.std().item()


READY = f"""
import torch
from seedpack.kernels.basis import noise_basis
x, coefs = torch.randn(1, {ROWS}), torch.randn({ROWS}, {COUNT})
noise = noise_basis("philox", 1)
noise.matmul(x[:, :64], coefs[:4], 4)
noise.dense(coefs[:4], 4, 64)
"""


def best(run: Callable[[], object], times: int = 5) -> float:
    found = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)


def measure(result: report.Result) -> None:
    counter = iter(range(10**6))
    kinds: dict[str, Callable[[int, int], nn.Module]] = {
        "nn.Linear": nn.Linear,
        "seedpack.nn.Linear, philox": lambda i, o: snn.Linear(i, o, COUNT, seed=next(counter)),
        "seedpack.nn.Linear, squirrel5": lambda i, o: snn.Linear(
            i, o, COUNT, seed=next(counter), generator="squirrel5"
        ),
        "seedpack.nn.Linear, philox, noise bias": lambda i, o: snn.Linear(
            i, o, COUNT, seed=next(counter), noise_bias=True
        ),
    }
    rows, first = [], None
    for label, linear in kinds.items():
        found = [scales(linear, seed) for seed in range(3)]
        forward, backward = (sum(values) / len(values) for values in zip(*found, strict=True))
        first = first or (forward, backward)
        rows.append(
            (label, f"{forward:.4f}", f"{forward / first[0]:.3f}", f"{backward:.4f}", f"{backward / first[1]:.3f}")
        )
    result.say(
        f"{BLOCKS} transformer blocks of width {WIDTH} (norms before, causal attention, GELU), layers of {COUNT} coefficients; "
        "standard deviation of what the blocks add to their input, and of the gradient at it, mean of three starts."
    )
    result.table(["layers", "activations", "of nn.Linear", "gradients", "of nn.Linear"], rows)

    x, coefs = torch.randn(1, ROWS), torch.randn(ROWS, COUNT)
    noise = noise_basis("philox", 1)
    fused = best(lambda: noise.matmul(x, coefs, ROWS))
    apart = best(lambda: x @ noise.dense(coefs, ROWS, ROWS).T)

    def by_torch() -> Tensor:
        """Multiply as one would write it: draw each row's noise, times its coefficients, times the input."""
        weight = torch.empty(ROWS, ROWS)
        for row in range(ROWS):
            torch.mv(torch.rand(ROWS, COUNT).mul_(2).sub_(1), coefs[row], out=weight[row])
        return x @ weight.T

    drawn = best(by_torch, 1)
    memory = [
        report.added_memory(READY, f"noise.matmul(x, coefs, {ROWS})"),
        report.added_memory(READY, f"x @ noise.dense(coefs, {ROWS}, {ROWS}).T"),
        ROWS * (ROWS + COUNT) * 4 / 1e6,
    ]
    words = ROWS * ROWS * COUNT
    result.say(
        f"A weight of {ROWS}×{ROWS}, {COUNT} coefficients for each row, one token, on {torch.get_num_threads()} cores: "
        f"{words / 1e9:.1f} thousand million random numbers (Philox, 25 operations each). Memory is what the product adds "
        "to the process."
    )
    result.table(
        ["product", "seconds", "numbers/s", "memory, MB"],
        [
            ("fused: generated in registers", f"{fused:.2f}", f"{words / fused:.3g}", f"{memory[0]:.1f}"),
            (
                "weight made by the same generator, then multiplied",
                f"{apart:.2f}",
                f"{words / apart:.3g}",
                f"{memory[1]:.1f}",
            ),
            (
                "noise of each row by torch.rand, weight made, then multiplied",
                f"{drawn:.2f}",
                f"{words / drawn:.3g}",
                f"{memory[2]:.1f} (by count)",
            ),
        ],
    )


if __name__ == "__main__":
    report.run("noise_layers", "Layers of noise", measure)
