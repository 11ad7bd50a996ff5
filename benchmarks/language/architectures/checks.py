"""The packed model against its dense rebuild, and against itself saved and loaded again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import seedpack
from benchmarks.language.architectures.cases import Case
from benchmarks.language.architectures.inputs import Candidate, Inputs, cloned
from benchmarks.language.architectures.models import described
from benchmarks.language.architectures.outputs import difference
from benchmarks.language.architectures.problems import Problems, attempt
from benchmarks.language.architectures.time_limit import TimedOut, time_limit
from seedpack.loader.layers import PackedModule
from seedpack.loader.parameters import PackedParameters

TOLERANCE = 1e-3
TOLERANCE_SAVED = 1e-6  # of the same parts, loaded again
GENERATE = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}


class Checks:
    """The comparisons of a case, in order; each adds to its record and problems.

    Args:
        case: which it is.
        packed: the packed model.
        folder: with the packed checkpoint in "packed"; dense and saved ones are put beside it.
        record: of the case.
        problems: of the case.
    """

    def __init__(self, case: Case, packed: Any, folder: Path, record: dict[str, Any], problems: Problems):
        self._class, self._packed, self._folder = case.model_class, packed, folder
        self._record, self._problems = record, problems
        self._first: tuple[str, Inputs, Any] | None = None  # label, inputs and output of the first forward pass
        record["packed_layers"] = sum(isinstance(module, PackedModule) for module in packed.modules())
        record["packed_parameters"] = sum(isinstance(module, PackedParameters) for module in packed.modules())
        attempt("unpack", lambda: seedpack.unpack(folder / "packed", folder / "decoded"))
        self._dense: Any = attempt("dense load", lambda: self._class.from_pretrained(folder / "decoded").eval())
        try:
            if self._dense.dtype != packed.dtype:
                problems.add("dtype", f"packed {packed.dtype}, dense {self._dense.dtype}")
        except Exception as error:
            problems.add_error("dtype", error)

    @torch.no_grad()
    def forward(self, inputs: list[Candidate], towers: list[tuple[str, str, Inputs]]) -> None:
        """Compare outputs of the model for each input, and of its towers."""
        self._record["differences"] = {}
        with self._counting_idle():
            for label, values in inputs:
                try:
                    expected = seeded(self._dense, values)
                except Exception as error:
                    self._problems.add("dense forward", f"{label}: {described(error)}")
                    continue
                output = self._compare("", label, values, expected)
                if output is not None:
                    self._first = self._first or (label, values, output)
            for name, label, values in towers:
                try:
                    expected = seeded(self._dense.get_submodule(name), values)
                except Exception:  # the first model took it, after others
                    continue
                self._compare(name, f"{name}({label})", values, expected)

    def _compare(self, name: str, label: str, values: Inputs, expected: Any) -> Any:
        """Return the output of the packed model, or of a part of it, compared; None if it raises."""
        try:
            output = seeded(self._packed.get_submodule(name), values)
        except Exception as error:
            self._problems.add_error("forward", error, label)
            return None
        distance, place = difference(output, expected)
        self._record["differences"][label] = distance
        if not distance <= TOLERANCE:
            by_chance, _ = difference(seeded(self._dense.get_submodule(name), values), expected)
            random = "" if by_chance <= TOLERANCE / 10 else " (dense is random too)"
            self._problems.add(f"mismatch{random}", f"{label}: {distance:.3g} at {place}")
        return output

    @contextlib.contextmanager
    def _counting_idle(self) -> Iterator[None]:
        """Record how many packed modules do not run."""
        modules = {n: m for n, m in self._packed.named_modules() if isinstance(m, PackedModule)}
        ran: set[str] = set()
        hooks = [module.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        idle = [name for name in modules if name not in ran]
        self._record |= {"never_run": len(idle), "never_run_names": idle[:6]}

    def generation(self, inputs: list[Candidate]) -> None:
        """Compare a few tokens, or a sound, that both models generate."""
        if not inputs or not getattr(self._packed, "can_generate", lambda: False)():
            return
        try:
            with time_limit(30):
                expected = generated(self._dense, inputs[0][1])
        except (Exception, TimedOut) as error:
            self._record["generate"] = f"dense cannot: {described(error)[:120]}"
            return
        try:
            with time_limit(40):
                output = generated(self._packed, inputs[0][1])
        except (Exception, TimedOut) as error:
            self._problems.add_error("generate", error)
            return
        same = output.shape == expected.shape and bool((output == expected).all())
        if expected.is_floating_point():
            same = output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-3, atol=1e-4)
        self._record["generate"] = "same" if same else "differs"
        if not same:
            text = f"{output.tolist()[:1]}, expected {expected.tolist()[:1]}"
            self._problems.add("generate", text[:300])

    @torch.no_grad()
    def saved_again(self) -> None:
        """Compare outputs and size after the packed model was saved by transformers and loaded again."""
        folder = self._folder / "again"
        attempt("save", lambda: self._packed.save_pretrained(folder))
        self._again: Any = attempt("load again", lambda: self._class.from_pretrained(folder).eval())
        if self._first is not None:
            label, values, expected = self._first
            try:
                distance, place = difference(seeded(self._again, values), expected)
                self._record["difference_saved"] = distance
                if not distance <= TOLERANCE_SAVED:
                    self._problems.add("mismatch after save", f"{label}: {distance:.3g} at {place}")
            except Exception as error:
                self._problems.add_error("forward after save", error, label)
        size, before = weight_bytes(folder), weight_bytes(self._folder / "packed")
        if size > 1.02 * before + 4096:
            self._problems.add("size after save", f"{size} bytes, packed by seedpack {before}")

    def dequantised(self, altered: set[str]) -> None:
        """Compare the tensors of `dequantize()` with the dense rebuild's, but for those that transformers alters."""
        dense = attempt("dequantize", self._again.dequantize) or self._again
        expected, state = self._dense.state_dict(), dense.state_dict()
        if expected.keys() != state.keys():
            self._problems.add("dequantize", f"keys: {sorted(expected.keys() ^ state.keys())[:6]}")
        names = [name for name in expected if name in state and name not in altered]
        differing = [name for name in names if not close(state[name], expected[name])]
        if differing:
            self._problems.add("dequantize", f"{len(differing)} tensors differ: {differing[:6]}")

    def loaded_by_seedpack(self) -> None:
        """Check the class of the model that `seedpack.load` gives."""
        try:
            model = seedpack.load(self._folder / "packed")
        except Exception as error:
            self._problems.add_error("seedpack.load", error)
            return
        if type(model).__name__ != self._class.__name__:
            self._problems.add("seedpack.load", f"gives {type(model).__name__}")


def seeded(model: Any, inputs: Inputs) -> Any:
    """Run a model with the same random numbers as any other."""
    torch.manual_seed(0)
    return model(**cloned(inputs))


@torch.no_grad()
def generated(model: Any, inputs: Inputs) -> Tensor:
    """Return what a model generates."""
    torch.manual_seed(0)
    given = {name: value for name, value in cloned(inputs).items() if name != "decoder_input_ids"}
    output: Any = model.generate(**given, **GENERATE)
    output = getattr(output, "sequences", output)
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def close(value: Tensor, expected: Tensor) -> bool:
    if value.shape != expected.shape:
        return False
    return torch.allclose(value.double(), expected.double(), rtol=1e-5, atol=1e-6, equal_nan=True)


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
