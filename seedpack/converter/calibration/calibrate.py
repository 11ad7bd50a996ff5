"""Calibration as `compress` asks for it: a text or batches in, the Hessian of every layer's input out."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedpack.codecs.importance import column_power
from seedpack.codecs.interfaces import Rates, RowScaling
from seedpack.converter.calibration import hessians, layerwise, sensitivity, tokens
from seedpack.converter.calibration.layerwise import Watch
from seedpack.converter.calibration.store import FOLDER, VERSION, Fitted, Store, fingerprint
from seedpack.converter.calibration.tuning import Tuned, tune
from seedpack.converter.fitting import Found, Inputs, fit, matrix_of
from seedpack.converter.plan import Plan, TensorPlan
from seedpack.converter.sources.base import Source
from seedpack.converter.sources.open import looks_like_hub_id
from seedpack.dtypes import PACKABLE
from seedpack.errors import ModelError
from seedpack.kernels.dispatch import Backend

TOKENS, CONTEXT = 16384, 512
Text = str | Path | Tensor | Iterable[Any]


@dataclass(frozen=True)
class Calibration:
    """What layers are fed.

    Attributes:
        text: "self": the model writes it; a text or JSON lines file; a data set of the hub; token ids [n, context]; or,
            for modules that are no language models, batches to run the module on.
        tokens: how many a language model reads.
        context: of how many tokens each.
        seed: of what the model writes.
        sequential: each layer of a language model is fitted to what it is fed once the layers before are packed.
        tune: epochs of tuning the packed language model to the original on the text.
    """

    text: Text
    tokens: int = TOKENS
    context: int = CONTEXT
    seed: int = 0
    sequential: bool = False
    tune: int = 0

    def __post_init__(self) -> None:
        if self.context < 2 or self.tokens < self.context:
            raise ModelError(
                f"calibration on {self.tokens} tokens in sequences of {self.context}: sequences must have at least 2, and "
                "there must be tokens for one of them"
            )
        if type(self.tune) is not int or self.tune < 0:
            raise ModelError(f"tune must be a count of epochs, got {self.tune!r}")


def calibration_of(text: Calibration | Text | None) -> Calibration | None:
    """What `compress` is given, with its defaults; None for "none"."""
    if text is None or (isinstance(text, str) and text == "none"):
        return None
    return text if isinstance(text, Calibration) else Calibration(text)


def calibrated(
    source: Source,
    calibration: Calibration | None,
    output: Path,
    device: torch.device,
    watch: Watch | None = None,
) -> Found:
    """The Hessians E[x·xᵀ] of the inputs of a model's layers as it is, by the names of their weights in the model.

    Those of a language model are kept in a folder beside the output, and found there again.

    Args:
        source: the model.
        calibration: what it is fed; None: nothing.
        output: of the run that they are for.
        device: to run on.
        watch: told of progress.
    """
    if calibration is None:
        return {}
    watch = watch or (lambda what, done, total: None)
    if source.opened is None:
        raise ModelError(
            f"{source.name}: calibration runs the model, and a bare state dict has none to run; pass a Hugging Face folder, "
            "or from Python the module itself and batches"
        )
    if isinstance(calibration.text, (str, Path, Tensor)):
        return _of_language_model(source, calibration, output, device, watch)
    model, _ = source.opened()
    return hessians.run(model.to(device), calibration.text, device)


def tuned(
    source: Source,
    calibration: Calibration,
    plan: Plan,
    inputs: Inputs,
    journal: Fitted,
    output: Path,
    device: torch.device,
    backend: Backend = "auto",
    watch: Watch | None = None,
) -> Tuned:
    """Scales, norms' gains and biases of the packed model, tuned to the original; see `tuning.tune`.

    Tensors are taken from the journal. Both models are in memory.
    """
    watch = watch or (lambda what, done, total: None)
    assert source.opened is not None
    teacher, tokenizer = source.opened()
    if layerwise.on_disk(teacher):
        raise ModelError(f"{source.name}: does not fit memory, and tuning needs it there twice; leave it out")
    if any(tensor.kind == "expert" and tensor.packed for tensor in plan.tensors):
        raise ModelError(f"{source.name}: tuning does not know mixtures of experts yet; leave it out")
    ids = _tokens(teacher.to(device), tokenizer, calibration, _store(source, calibration, output), watch)
    student = copy.deepcopy(teacher).float()
    if teacher.dtype != torch.float32:
        teacher = copy.deepcopy(teacher).float()  # a live one stays as it is
    parameters = dict(student.named_parameters(remove_duplicate=False))
    tensors = {p: t for t in plan.tensors if t.packed for p in source.parameters(t.name) if p in parameters}
    values = [
        name for t in plan.tensors if not t.packed and len(t.shape) == 1 and t.dtype in PACKABLE
        for name in source.parameters(t.name)[:1] if name in parameters
    ]  # fmt: skip
    rows = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            parts, _ = fit(source, tensor, inputs, device, backend, None, journal)
            parameters[name].copy_(_decoded(tensor, parts, device))
            if tensor.kind != "conv" and isinstance(tensor.codec, RowScaling):
                rows[name] = tensor.name
    return tune(student, teacher, rows, values, ids, epochs=calibration.tune, seed=calibration.seed, watch=watch)


def measured_costs(
    source: Source,
    plan: Plan,
    calibration: Calibration,
    inputs: Inputs,
    output: Path,
    device: torch.device,
    watch: Watch | None = None,
) -> dict[str, float]:
    """What a relative error of 1 in a tensor costs in KL divergence, by the names of tensors whose codec has variants.

    Empty where that is not known: for what is no language model, or one that is partly on disk.
    """
    watch = watch or (lambda what, done, total: None)
    if not isinstance(calibration.text, (str, Path, Tensor)):
        return {}
    store = _store(source, calibration, output)
    outputs = store.output_costs()
    if outputs is None:
        assert source.opened is not None
        model, tokenizer = source.opened()
        if layerwise.on_disk(model):
            return {}
        ids = _tokens(model.to(device), tokenizer, calibration, store, watch)
        total = min(ids.numel(), sensitivity.ENOUGH_TOKENS)
        outputs = sensitivity.output_costs(model, ids, lambda n: watch("Measuring what errors cost, tokens", n, total))
        store.save_output_costs(outputs)
        del model
    costs = {}
    rated = [(t, t.codec) for t in plan.tensors if t.packed and isinstance(t.codec, Rates)]
    for count, (tensor, codec) in enumerate(rated):
        watch("Weighing tensors", 1 if count else 0, len(rated))
        matrix = matrix_of(source, tensor).to(device).float()
        cost = 0.0
        for parameter in source.parameters(tensor.name):  # an embedding and a head tied to it both cost
            if (channels := outputs.get(f"{parameter}{sensitivity.COLUMNS}")) is not None:
                cost += float((column_power(matrix) / len(matrix)) @ channels)
            if (channels := outputs.get(parameter)) is not None:
                h = inputs.importance(tensor.name)
                cost += codec.sensitivity(matrix, h, channels)
        if cost:
            costs[tensor.name] = cost
    return costs


def calibrated_in_sequence(
    source: Source,
    calibration: Calibration,
    plan: Plan,
    output: Path,
    device: torch.device,
    backend: Backend = "auto",
    watch: Watch | None = None,
) -> Store:
    """As `calibrated` for a language model in memory, each layer's inputs being what the packed layers before it give.

    Layers are fitted on the way, by `plan`: the store's journal has their parts then.
    """
    watch = watch or (lambda what, done, total: None)
    tensors = {name: t for t in plan.tensors if t.packed for name in source.parameters(t.name)}

    def replaced(model: Any, store: Store, values: dict[str, Tensor]) -> AbstractContextManager[None]:
        here = {name: tensors[name] for name in values if name in tensors}
        return _replaced(source, model, here, Inputs(source, {}, values), store.fitted, device, backend)

    return _of_language_model(source, calibration, output, device, watch, plan, replaced)


@contextmanager
def _replaced(
    source: Source, model: Any, tensors: dict[str, TensorPlan], inputs: Inputs, journal: Fitted, device: torch.device,
    backend: Backend,
) -> Iterator[None]:  # fmt: skip
    """Weights of a model as they will be once they are packed."""
    before: dict[str, Tensor] = {}
    try:
        for name, tensor in tensors.items():
            parts, _ = fit(source, tensor, inputs, device, backend, None, journal)
            before[name] = model.get_parameter(name).detach().clone()
            model.get_parameter(name).copy_(_decoded(tensor, parts, device))
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).copy_(value)


def _decoded(tensor: TensorPlan, parts: dict[str, Tensor], device: torch.device) -> Tensor:
    """A packed tensor in its dense shape, float32."""
    there = {name: part.to(device) for name, part in parts.items()}
    decoded = tensor.codec.decode(there, tensor.codec_shape, torch.float32)
    return (decoded.mT if tensor.transposed else decoded).reshape(tensor.shape)


def _of_language_model(
    source: Source, calibration: Calibration, output: Path, device: torch.device, watch: Watch, plan: Plan | None = None,
    replaced: Callable[[Any, Store, dict[str, Tensor]], AbstractContextManager[None]] | None = None,
) -> Store:  # fmt: skip
    watch("Reading the model", 0, 1)
    store = _store(source, calibration, output, plan)
    if store.complete:
        return store
    assert source.opened is not None
    model, tokenizer = source.opened()
    if not hasattr(model, "generate") or model.get_output_embeddings() is None or model.config.is_encoder_decoder:
        raise ModelError(f"{source.name}: calibration on text is for causal language models; pass batches from Python")
    if not layerwise.on_disk(model):
        model.to(device)
    elif replaced is not None:
        raise ModelError(
            f"{source.name}: does not fit memory, and calibration in sequence changes its weights; leave it out"
        )
    ids = _tokens(model, tokenizer, calibration, _store(source, calibration, output), watch)
    if int(ids.max()) >= model.get_input_embeddings().num_embeddings or int(ids.min()) < 0:
        raise ModelError(
            f"{source.name}: has {model.get_input_embeddings().num_embeddings} tokens, the text has others; use the model's own tokenizer"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and ids.shape[1] > longest:
        raise ModelError(
            f"{source.name}: takes {longest} tokens at most, the text has sequences of {ids.shape[1]}; from "
            "Python, give Calibration a smaller context"
        )
    count = len(layerwise.decoder_layers(model))

    def found(name: str, values: dict[str, Tensor], output: Tensor | None) -> None:
        store.add(name, values, output)
        watch("Calibrating, layers", 1 if name else 0, count)

    change = None if replaced is None else lambda values: replaced(model, store, values)
    layerwise.run(model, ids, found, store.skip, change)
    return store


def _store(source: Source, calibration: Calibration, output: Path, plan: Plan | None = None) -> Store:
    made_of = {
        "model": fingerprint(source), "text": _identity(calibration.text), "tokens": calibration.tokens,
        "context": calibration.context, "seed": calibration.seed if calibration.text == "self" else None, "version": VERSION,
    }  # fmt: skip
    if plan is not None:
        made_of["plan"] = hashlib.sha256(plan.dumps().encode()).hexdigest()
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    return Store(output.parent / FOLDER / key, made_of)


def _tokens(model: Any, tokenizer: Any, calibration: Calibration, store: Store, watch: Watch) -> Tensor:
    text, count, context = calibration.text, calibration.tokens, calibration.context
    if isinstance(text, Tensor):
        return text
    if text == "self":
        ids = store.tokens()
        if ids is None:
            ids = tokens.written(
                model, count, context, calibration.seed, lambda n: watch("Writing text, tokens", n, count)
            )
            store.save_tokens(ids)
        return ids
    if tokenizer is None:
        raise ModelError(f"calibration on {text}: the model has no tokenizer; give token ids [n, context]")
    path = Path(str(text))
    if path.is_file():
        return tokens.from_text(tokens.read_texts(path), tokenizer, count, context, str(path))
    return tokens.from_text(tokens.hub_texts(str(text)), tokenizer, count, context, str(text))


def _identity(text: Text) -> str:
    """What tells one text from another."""
    if isinstance(text, Tensor):
        if text.dim() != 2 or text.dtype != torch.int64 or not text.numel():
            raise ModelError(f"calibration: token ids must be int64 [n, context], got {text.dtype} {list(text.shape)}")
        return hashlib.sha256(text.contiguous().cpu().numpy().tobytes()).hexdigest()
    if text == "self":
        return "self"
    if len(str(text)) > 4096 or "\n" in str(text):
        raise ModelError("calibration: give the name of a file, not a text itself; or token ids")
    path = Path(str(text))
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if looks_like_hub_id(str(text).partition(":")[0]):
        return str(text)
    raise ModelError(
        f"calibration {str(text)!r}: is no file, no data set of the hub (org/name), and neither self nor none"
    )
