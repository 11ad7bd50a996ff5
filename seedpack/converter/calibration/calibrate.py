"""Calibration: a text or batches in, statistics of every layer's input out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack._version import WRITER
from seedpack.converter.calibration import layerwise, moments, sequence, tokens
from seedpack.converter.calibration.sequence import SequenceError
from seedpack.converter.calibration.store import VERSION, Store, remove_unclaimed
from seedpack.converter.fitting import decoded, fit
from seedpack.converter.journal import tensors_digest
from seedpack.converter.options import MIXED, SELF, Calibration
from seedpack.converter.plan import Plan, TensorPlan
from seedpack.converter.run import Run
from seedpack.converter.snapshot import Snapshot
from seedpack.converter.sources.base import OpenModel
from seedpack.converter.sources.open import looks_like_hub_id
from seedpack.converter.statistics import Statistics
from seedpack.errors import ModelError, OutputError, first_line

TOKENIZER_FILES = ("*token*", "*vocab*", "merges*", "*.model", "*.py")


def calibrate(run: Run, plan: Plan | None = None) -> Statistics:
    """Return the statistics of the inputs of a model's layers as it is.

    Those of a language model are kept in a folder beside the output, and found there again. Workers on other machines fit the
    tensors of each layer by a plan, if one is given, while the next ones are calibrated.
    """
    given = run.options.importance or {}
    if run.calibration is None:
        return Statistics(run.source, given)
    if run.calibration.is_text:
        streamed = plan if run.workers is not None and run.workers.streams else None
        return _statistics(run, _read_text(run, store_of(run), streamed))
    model = run.source.open_model().module
    return Statistics(run.source, given, moments.run(model.to(run.device), run.calibration.text, run.device))


def calibrate_in_sequence(run: Run, plan: Plan) -> Statistics:
    """Return the statistics of the inputs that packed layers give to those behind them, for a language model in memory, and what
    weights are shifted by; see `sequence`.

    Layers are fitted on the way, by `plan`: the journal has their parts then.

    Raises:
        SequenceError: the model cannot be packed so.
    """
    assert run.calibration is not None
    if not run.calibration.is_text:
        raise ModelError("calibration in sequence is for language models calibrated on text; leave it out")
    store = store_of(run, plan)
    try:
        return _statistics(run, _read_text(run, store, plan, in_sequence=True))
    except SequenceError:
        run.release(store.folder)
        remove_unclaimed(store.folder)
        raise


def _by_parameter(run: Run, plan: Plan) -> dict[str, TensorPlan]:
    return {name: t for t in plan.tensors if t.packed for name in run.source.parameters(t.name)}


@contextmanager
def with_packed_weights(run: Run, model: Any, tensors: dict[str, TensorPlan], statistics: Statistics) -> Iterator[None]:
    """Replace weights of a model by what they will be once they are packed.

    Args:
        run: the run.
        model: in memory.
        tensors: to be packed, by parameter.
        statistics: to fit them with.
    """
    before: dict[str, Tensor] = {}
    try:
        for name, tensor in tensors.items():
            parts, _ = fit(run.quiet(), tensor, statistics)
            before[name] = model.get_parameter(name).detach().clone()
            model.get_parameter(name).copy_(decoded(tensor, parts, run.device))
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).copy_(value)


def _statistics(run: Run, store: Store) -> Statistics:
    return Statistics(run.source, run.options.importance or {}, store)


def _read_text(run: Run, store: Store, plan: Plan | None = None, *, in_sequence: bool = False) -> Store:
    """Have a language model read its text, layer by layer, from where the store ends.

    Layers are fitted on the way by a plan, if one is given: by workers, or in sequence.
    """
    tensors = _by_parameter(run, plan) if plan is not None else {}
    run.progress("Loading the model to calibrate", 0, 0)
    if store.complete:
        return store
    opened = run.source.open_model()
    model, name = opened.module, run.source.name
    if opened.generate is None:
        raise ModelError(f"{name}: calibration on text is for causal language models; pass batches from Python")
    if not layerwise.on_disk(model):
        model.to(run.device)
    elif in_sequence:
        raise SequenceError("it does not fit memory")
    ids = tokens_of(run, opened, store_of(run))
    _require_readable(name, model, ids)
    if not store.done:
        layerwise.require_separable(opened, ids)

    run.resuming(store.done, f"{len(opened.layer_names)} layers calibrated")
    run.progress("Calibrating", store.done, len(opened.layer_names), "layers")

    def known(values: dict[str, Tensor]) -> tuple[dict[str, TensorPlan], Statistics]:
        fitted = {name: tensors[name].with_hessian() for name in values if name in tensors}
        return fitted, Statistics(run.source, run.options.importance or {}, values)

    def layer_done(layer: str, values: dict[str, Tensor], output: Tensor | None) -> None:
        store.add(layer, values, output)
        if run.workers is not None and not in_sequence:
            fitted, statistics = known(values)
            run.workers.submit(run, fitted.values(), statistics)
        run.progress("Calibrating", 1 if layer else 0, len(opened.layer_names), "layers")

    if in_sequence:
        call = sequence.packing(
            opened, layer_done, store.skip, tensors, lambda values: with_packed_weights(run, model, *known(values))
        )
    else:
        call = layerwise.measuring(opened, layer_done, store.skip)
    try:
        layerwise.run(opened, ids, layer_done, call)
    except Exception as error:  # models fail in many ways
        if not in_sequence or isinstance(error, OutputError):
            raise
        raise SequenceError(first_line(error)) from error
    return store


def _require_readable(name: str, model: Any, ids: Tensor) -> None:
    """Refuse tokens that a model does not have, and sequences longer than it takes."""
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
        raise ModelError(f"{name}: has {vocabulary} tokens, the text has others; use the model's own tokenizer")
    _require_context(name, model, ids.shape[1])


def _require_context(name: str, model: Any, context: int) -> None:
    """Refuse sequences longer than a model takes."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < context:  # some say -1 for any number
        raise ModelError(
            f"{name}: takes {longest} tokens at most, the text has sequences of {context}; ask for shorter ones "
            "(--calibration-context, Calibration(context=…))"
        )


def store_of(run: Run, plan: Plan | None = None) -> Store:
    """Return the store of a model and its text, or of those and a plan that layers are packed by on the way."""
    calibration = run.calibration
    assert calibration is not None
    made_of = {
        "model": run.source.fingerprint,
        "text": _identity(calibration),
        "tokens": calibration.tokens,
        "context": calibration.context,
        "seed": calibration.seed if calibration.writes else None,
        "version": VERSION,
    }
    if isinstance(calibration.reads, (str, Path)) and calibration.reads:
        files = run.source.beside.items()
        made_of["tokenizer"] = {n: digest for n, digest in files if any(fnmatch(n, p) for p in TOKENIZER_FILES)}
    if plan is not None:
        made_of["kind"] = run.kind
        made_of["importance"] = tensors_digest(dict(run.options.importance or {}))
        made_of["shift"] = [sequence.STEP, sequence.DAMPING]
        made_of["writer"] = WRITER  # shifts make up for the errors of one encoder
        made_of["plan"] = hashlib.sha256(plan.dumps().encode()).hexdigest()
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = run.calibrations / key
    run.hold(folder)
    store = Store(folder, made_of)
    store.claim(for_others=plan is None and not calibration.is_usual)
    return store


def forget_own(run: Run) -> bool:
    """Remove what was measured for this run alone; return whether something stays."""
    folders = list(run.locks)
    run.release()
    for folder in folders:
        remove_unclaimed(folder)
    return any(folder.exists() for folder in folders)


def _begun(run: Run, store: Store, work: str, goal: str) -> Snapshot:
    """Return the state of work that an earlier run may have begun, and say how far that came."""
    snapshot = store.snapshot(work, run.device.type)
    run.resuming(snapshot.done, goal)
    return snapshot


def tokens_of(run: Run, opened: OpenModel, store: Store) -> Tensor:
    """Return the tokens to read, int64 [n, context]: given, from a text, or written by the model and kept."""
    calibration = run.calibration
    assert calibration is not None
    if isinstance(calibration.text, Tensor):
        return calibration.text
    count = calibration.tokens // 2 if calibration.is_mixed else calibration.tokens
    # The given text first: one that is too short is refused before the model writes for minutes.
    given = [_read(opened, str(calibration.reads), count, calibration.context)] if calibration.reads else []
    parts = [_written(run, opened, store, count), *given] if calibration.writes else given
    turns = torch.cat([(torch.arange(len(part)) + 0.5) / len(part) for part in parts])
    return torch.cat(parts)[turns.argsort(stable=True)]


def _written(run: Run, opened: OpenModel, store: Store, count: int) -> Tensor:
    """Return what the model writes, which is kept."""
    if (kept := store.tokens()) is not None:
        return kept
    calibration = run.calibration
    assert calibration is not None and opened.generate is not None
    _require_context(run.source.name, opened.module, calibration.context)
    snapshot = _begun(run, store, "tokens", f"{count} tokens written")

    def told(done: int) -> None:
        run.progress("Writing text", done, count, "tokens")

    ids = opened.generate(opened.module, count, calibration.context, calibration.seed, told, snapshot).cpu()
    store.save_tokens(ids)
    snapshot.remove()
    return ids


def _read(opened: OpenModel, text: str, count: int, context: int) -> Tensor:
    """Return the first tokens of a text."""
    if opened.tokenizer is None:
        raise ModelError(f"calibration on {text}: the model has no tokenizer; give token ids [n, context]")
    texts = tokens.read_texts(path) if (path := Path(text)).is_file() else tokens.hub_texts(text)
    return tokens.from_text(texts, opened.tokenizer, count, context, text)


def _identity(calibration: Calibration) -> str:
    """Return what tells one text from another."""
    text = calibration.reads
    if isinstance(text, Tensor):
        if text.shape.numel() == 0 or len(text.shape) != 2 or text.dtype != torch.int64:
            raise ModelError(f"calibration: token ids must be int64 [n, context], got {text.dtype} {list(text.shape)}")
        return hashlib.sha256(text.contiguous().cpu().numpy().tobytes()).hexdigest()
    if calibration.writes:
        return MIXED + _identity(replace(calibration, text=text)) if text else SELF
    if len(str(text)) > 4096 or "\n" in str(text):
        raise ModelError("calibration: give the name of a file, not a text itself; or token ids")
    path = Path(str(text))
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if looks_like_hub_id(str(text).partition(":")[0]):
        return str(text)
    raise ModelError(
        f"calibration {str(text)!r}: no such file, not a data set of the hub (org/name), and neither self nor none"
    )
