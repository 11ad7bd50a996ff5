"""The sweep of every architecture: its cases, its limits of time, what it finds, and its page."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.language.architectures import page
from benchmarks.language.architectures.case import run_case
from benchmarks.language.architectures.cases import Case, all_cases
from benchmarks.language.architectures.outputs import difference
from benchmarks.language.architectures.rules import small
from benchmarks.language.architectures.time_limit import TimedOut, time_limit
from benchmarks.lib.report import Result

LLAMA = Case("llama", "LlamaForCausalLM", "CAUSAL_LM")
VIT = Case("vit", "ViTForImageClassification", "IMAGE_CLASSIFICATION")


@pytest.mark.parametrize("case", [LLAMA, VIT], ids=lambda case: case.key)
@pytest.mark.filterwarnings("ignore")
def test_a_case_agrees(case: Case, tmp_path: Path) -> None:
    assert case in all_cases()
    record = run_case(case, tmp_path)
    assert record["status"] == "ok", record["problems"]
    assert record["packed_layers"] and record["differences"] and not record["never_run"]


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_product_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaForCausalLM.forward

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if hasattr(self.lm_head, "codec"):  # a packed layer
            output.logits *= 1.01
        return output

    wrong.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(LlamaForCausalLM, "forward", wrong)
    record = run_case(LLAMA, tmp_path)
    assert record["status"] == "fail"
    assert {problem["kind"] for problem in record["problems"]} == {"mismatch"}


def test_what_transformers_cannot_build_is_skipped(tmp_path: Path) -> None:
    record = run_case(Case("llama", "NoSuchClass", "MODEL"), tmp_path)
    assert record["status"] == "skip" and "NoSuchClass" in record["why"][0]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hidden_size", 4096, 64),
        ("hidden_size", 32, 32),
        ("num_nextn_predict_layers", 1, 0),
        ("depths", [2, 2, 6, 2], [1, 1, 1, 1]),
        ("hidden_sizes", (96, 192, 384), (16, 32, 64)),
        ("use_cache", True, True),
    ],
)
def test_sizes_become_small(name: str, value: object, expected: object) -> None:
    assert small(name, value) == expected


def test_differences_are_relative_and_of_every_tensor() -> None:
    output = {"logits": torch.full((4,), 2.0), "hidden": (torch.zeros(2), torch.tensor([float("inf"), 1.0]))}
    other = {"logits": torch.full((4,), 2.2), "hidden": output["hidden"]}
    assert difference(output, output) == (0.0, "")
    distance, place = difference(other, output)
    assert distance == pytest.approx(0.1) and place == "logits"
    assert difference({"logits": output["logits"]}, output)[0] == float("inf")


def test_a_limit_within_a_limit_leaves_the_outer_one() -> None:
    with pytest.raises(TimedOut, match=r"over 0\.2 s"), time_limit(0.2):
        with time_limit(5):
            pass
        time.sleep(5)


def test_the_page_groups_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    records: dict[str, dict[str, Any]] = {
        "a:A": {
            "task": "CAUSAL_LM", "status": "ok", "problems": [], "bits_per_weight": 4.5,
            "raw_shares": {"no matrix": 0.5, "svd would take 40.0 bits per weight": 0.2, "excluded": 0.1},
        },
        "b:B": {
            "task": "MODEL", "status": "skip", "problems": [],
            "why": ["ImportError: B requires the natten library but"],
        },
        "c:C": {"task": "MODEL", "status": "fail", "problems": [{"kind": "load", "text": "x | y", "place": ""}]},
    }  # fmt: skip
    result = Result("architectures", page.TITLE, "python -m benchmarks.language.architectures --write")
    page.write(result, records, 4)
    text = " ".join("\n".join(result.lines).split())
    assert "So far 3 of 4 were run." in text
    assert "| `a:A` | 30% | would take more bits than it does | 20% |" in text
    assert "**A package is not installed** (1) - `b:B`: natten" in text
    assert "| `c:C` | load | x / y |" in text
    assert "| all | 1 | 0 | 1 | 1 | 3 |" in text
