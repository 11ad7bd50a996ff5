"""Measure what each part of the trellis's fit brings: per-channel scaling, rotation, error feedback, and sketches of the whole model's Hessian."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.language.calibration import self_calibrated
from benchmarks.language.table import CONTEXT, Recorded
from benchmarks.lib import models, report
from seedpack.codecs import trellis
from seedpack.codecs.trellis import TrellisCodec
from seedpack.converter.calibration.layerwise import differentiable, recomputed
from seedpack.eval.language import compare_language_models, windows
from seedpack.hf.language_model import load_language_model
from seedpack.linalg import ldlq_correction

ROWS = 192
QUICK, FULL = "at 3 bits, effort fast", "at 2 bits, effort default"
TOKENS = {QUICK: 4096, FULL: 16384}  # scored
ITERATIONS = 3
Sketches = dict[str, tuple[Tensor, Tensor]]  # of a weight: E[‖g‖²·x·xᵀ] [in, in] and E[‖x‖²·g·gᵀ] [out, out]


def linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of the decoder, by the names of their weights."""
    return {
        f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "layers" in name
    }  # fmt: skip


def sketched(model: Any, tokens: Tensor, before: Sketches | None = None) -> Sketches:
    """Kronecker factors of the Hessian of the model's KL divergence by each weight (YAQA, Tseng et al., arXiv 2505.22988):
    a power iteration from factors before, or from the identity; E[(gᵀ·O·g)·x·xᵀ] and E[(xᵀ·I·x)·g·gᵀ], each of norm one.
    x is a layer's input, g the gradient of the text's log-likelihood by its output, I and O are the factors before."""
    found: Sketches = {}

    def seen(name: str, x: Tensor, out: Tensor) -> None:
        def grown(gradient: Tensor) -> None:
            rows, g = x.flatten(0, -2), gradient.detach().flatten(0, -2)
            inside, outside = (rows, g) if before is None else (rows @ before[name][0], g @ before[name][1])
            sides = (
                rows.mT @ (rows * (g * outside).sum(1, keepdim=True)),
                g.mT @ (g * (rows * inside).sum(1, keepdim=True)),
            )
            known = found.get(name)
            found[name] = sides if known is None else (known[0] + sides[0], known[1] + sides[1])

        if out.requires_grad:
            out.register_hook(grown)

    layers = linears(model)
    layer_names = [name for name, _ in model.named_modules() if re.fullmatch(r"model\.layers\.\d+", name)]
    with differentiable(model), recomputed(model, layer_names):
        hooks = [
            model.get_input_embeddings().register_forward_hook(
                lambda layer, args, out: out.detach().requires_grad_(True)
            )
        ]
        hooks += [
            layer.register_forward_hook(lambda layer, args, out, name=name: seen(name, args[0].detach(), out))
            for name, layer in layers.items()
        ]
        for ids in tokens.split(2):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        for hook in hooks:
            hook.remove()
    return {name: (inputs / inputs.norm(), outputs / outputs.norm()) for name, (inputs, outputs) in found.items()}


@contextlib.contextmanager
def unrotated() -> Iterator[None]:
    """The trellis without its rotation."""
    with mock.patch.multiple(trellis, rotate=lambda weight, seed: weight, unrotate=lambda weight, seed: weight):
        yield


def fitted(weight: Tensor, codec: TrellisCodec, importance: Tensor | None, output: Tensor | None = None) -> Tensor:
    """A weight as its codec rebuilds it; with an output side, rows too compensate for the errors of rows after them."""

    def rebuilt(part: Tensor) -> Tensor:
        return codec.decode(codec.encode(part, importance), (len(part), part.shape[1]), torch.float32)

    if output is None:
        return rebuilt(weight)
    damped = output.double() + 0.01 * output.double().diagonal().mean() * torch.eye(len(output), dtype=torch.float64)
    factor = torch.linalg.cholesky(damped)
    error, result = torch.zeros(weight.shape, dtype=torch.float64), weight.clone()
    for high in range(len(weight), 0, -ROWS):
        low = max(0, high - ROWS)
        short = ldlq_correction(error.mT, factor, low, high, high).mT
        result[low:high] = rebuilt((weight[low:high] - short).float())
        error[low:high] = result[low:high].double() - weight[low:high]
    return result


def measure(result: report.Result) -> None:
    folder, text = models.smollm2(), models.wikitext()
    model, tokenizer = load_language_model(folder)
    ids = {at: windows(tokenizer, text, CONTEXT, tokens) for at, tokens in TOKENS.items()}
    place = models.CACHE / "calibration" / folder.name / "packed"  # beside what calibration.py keeps
    store = self_calibrated(folder, place)
    tokens = store.tokens()
    assert tokens is not None
    hessian = store.get

    @functools.cache
    def original(at: str) -> Recorded:
        return Recorded(model, ids[at])

    @functools.cache
    def sketches(iterations: int) -> Sketches:
        assert tokens is not None
        return sketched(model, tokens, sketches(iterations - 1) if iterations > 1 else None)

    Fit = Callable[[str, Tensor], Tensor]
    plain = TrellisCodec(3, effort="fast", balance=False)
    answering, balanced = replace(plain, circular=False), replace(plain, circular=False, balance=True)
    full = TrellisCodec(2, circular=False)
    methods: dict[str, tuple[str, bool, Fit]] = {
        "none": (QUICK, False, lambda name, w: fitted(w, plain, None)),
        "balance": (QUICK, False, lambda name, w: fitted(w, replace(plain, balance=True), None)),
        "rotation": (QUICK, True, lambda name, w: fitted(w, plain, None)),
        "rotation, balance": (QUICK, True, lambda name, w: fitted(w, replace(plain, balance=True), None)),
        "feedback": (QUICK, False, lambda name, w: fitted(w, answering, hessian(name))),
        "rotation, feedback": (QUICK, True, lambda name, w: fitted(w, answering, hessian(name))),
        "rotation, balance, feedback": (QUICK, True, lambda name, w: fitted(w, balanced, hessian(name))),
        "…, output side": (QUICK, True, lambda name, w: fitted(w, balanced, hessian(name), sketches(1)[name][1])),
        "…, gradients weigh inputs": (QUICK, True, lambda name, w: fitted(w, balanced, sketches(1)[name][0])),
        "…, gradients weigh inputs, output side": (QUICK, True, lambda name, w: fitted(w, balanced, *sketches(1)[name])),
        "all three": (FULL, True, lambda name, w: fitted(w, full, hessian(name))),
        "all three, gradients weigh inputs": (FULL, True, lambda name, w: fitted(w, full, sketches(1)[name][0])),
        f"all three, {ITERATIONS} power iterations weigh inputs": (
            FULL, True, lambda name, w: fitted(w, full, sketches(ITERATIONS)[name][0])
        ),
        f"all three, {ITERATIONS} power iterations, output side": (
            FULL, True, lambda name, w: fitted(w, full, *sketches(ITERATIONS)[name])
        ),
    }  # fmt: skip

    def scored(way: tuple[str, bool, Fit]) -> dict[str, Any]:
        at, rotates, fit = way
        other = copy.deepcopy(model)
        with torch.no_grad(), contextlib.nullcontext() if rotates else unrotated():
            for name, layer in linears(other).items():
                layer.weight.copy_(fit(name, layer.weight.detach()))
        return asdict(compare_language_models(original(at), [other], ids[at])[0])

    rows = result.rows_of(methods, scored)
    result.say(
        "SmolLM2-135M-Instruct (rescaled), its linear layers by the trellis, one by one on the original's inputs; "
        f"{models.WIKITEXT}, context {CONTEXT}. Hessians and gradients of 16,384 tokens that the model wrote."
    )
    for at in (QUICK, FULL):
        found = [row for label, row in rows.items() if methods[label][0] == at]
        if found:
            result.say(
                f"Fitted {at}; {found[0]['tokens']:,} tokens, perplexity unpacked {found[0]['perplexity_original']:.3f}."
            )
            result.table(
                ["ingredients", "KL mean", "perplexity", "top-1", "measured"],
                [
                    (r["label"], f"{r['kl_mean']:.4f}", f"{r['perplexity_packed']:.2f}", f"{100 * r['top1_agreement']:.1f}%",
                     r["measured"])
                    for r in found
                ],
            )  # fmt: skip


if __name__ == "__main__":
    report.run("ingredients", "What each ingredient brings", measure)
