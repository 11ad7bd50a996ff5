"""The codec of docs/adding-a-codec.md passes the checks of seedpack's own."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import seedpack
from seedpack.codecs import names, registry
from seedpack.codecs.interfaces import HessianFitting, Rates, RowScaling
from seedpack.errors import CodecError
from tests.helpers.codecs import check_config, check_contract, check_refusals

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-codec.md"


def test_the_codec_of_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (names, registry):
        monkeypatch.setattr(module, "REGISTRY", names.REGISTRY.copy())
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    exec(code, page.__dict__)
    codec, weight = registry.register_codec(page.RowInt8Codec)(), torch.randn(10, 24)
    check_config(codec)
    check_refusals(codec, weight)
    decoded = check_contract(codec, weight)
    assert float((decoded - weight).norm() / weight.norm()) < 0.01
    assert isinstance(codec, RowScaling) and not isinstance(codec, (Rates, HessianFitting))
    doubled = codec.rescaled(codec.encode(weight), torch.full((10,), 2.0))
    assert torch.equal(codec.decode(doubled, (10, 24), torch.float32), 2 * decoded)
    layer = nn.Linear(24, 10)
    assert seedpack.compress(layer, tmp_path / "packed", codec="row-int8").error_db < -40
    loaded = seedpack.load(tmp_path / "packed", model=nn.Linear(24, 10))
    with torch.no_grad():
        torch.testing.assert_close(loaded(torch.ones(1, 24)), layer(torch.ones(1, 24)), rtol=0, atol=0.05)
    with pytest.raises(CodecError, match="row-int8: importance must have one value for each of 24 input channels"):
        codec.encode(weight, torch.ones(3))
