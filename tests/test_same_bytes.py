"""Hold what `compress` writes to the sums in `golden/same_bytes.json`; see `golden/same_bytes.py`."""

from __future__ import annotations

import json

import pytest

from tests.golden import same_bytes

KNOWN = json.loads(same_bytes.SUMS.read_text())


def test_every_case_is_recorded() -> None:
    assert KNOWN["cases"].keys() == same_bytes.CASES.keys()


@pytest.mark.parametrize("name", same_bytes.CASES)
def test_same_bytes(name: str) -> None:
    expected, found = KNOWN["cases"][name], same_bytes.run(name)
    if name.startswith(same_bytes.PORTABLE) or same_bytes.machine() == KNOWN["machine"]:
        assert found == expected
    elif "error_db" in expected:  # sums of floats: as good, if not the same
        assert found["error_db"] == pytest.approx(expected["error_db"], abs=0.1)
