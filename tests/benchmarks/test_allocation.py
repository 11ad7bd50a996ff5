from __future__ import annotations

import pytest

from benchmarks.language.allocation import fused, least

Q, K, DOWN = (f"layers.0.{name}_proj.weight" for name in ("self_attn.q", "self_attn.k", "mlp.down"))


def test_fused_layers_are_one() -> None:
    assert fused(Q) == fused(K) != fused(DOWN)
    assert fused(Q) != fused(Q.replace("0", "1"))


def test_what_is_left_at_best() -> None:
    weights = {Q: 100, K: 100, DOWN: 200}
    assert least({Q: 1.0, K: 1.0, DOWN: 2.0}, weights, str) == pytest.approx(1)
    # Costs of a weight of 1, 4 and 4: a geometric mean of 2^1.5, a mean of 13 / 4.
    assert least({Q: 1.0, K: 4.0, DOWN: 8.0}, weights, str) == pytest.approx(2**1.5 * 4 / 13)
    assert least({Q: 1.0, K: 4.0, DOWN: 5.0}, weights, fused) == pytest.approx(1)
