"""What users may rely on."""

from __future__ import annotations

import subprocess
import sys

import pytest

import seedpack
from tests.helpers.marks import slow


def test_exported_names() -> None:
    names = (
        "Calibration Codec CompressOptions Plan SeedpackConfig SeedpackError __version__ compress get_codec load plan register_codec save "
        "unpack"
    )
    assert seedpack.__all__ == names.split()
    assert dir(seedpack) == sorted(seedpack.__all__)
    for name in seedpack.__all__:
        assert getattr(seedpack, name) is not None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = seedpack.nope


@pytest.mark.parametrize("order", ["import seedpack, transformers", *slow("import transformers, seedpack")])
def test_transformers_learns_of_seedpack_in_either_order(order: str) -> None:
    code = f"{order}\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as q\nprint('seedpack' in q)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
