"""compress, load, save, unpack: plans, codecs and the format joined."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seedpack._version import WRITER
from seedpack.codecs.base import Codec
from seedpack.converter.budget import Sensitivities, is_budget, with_bits, with_size
from seedpack.converter.calibration.calibrate import (
    Calibration,
    Text,
    calibrated,
    calibrated_in_sequence,
    calibration_of,
    measured_costs,
    tuned,
)
from seedpack.converter.calibration.layerwise import Watch as CalibrationWatch
from seedpack.converter.calibration.store import Store
from seedpack.converter.fitting import Found, Inputs, Report, Watch, fit, fitting_device, leave_nonfinite, retold
from seedpack.converter.plan import Plan, codec_for, make_plan
from seedpack.converter.sources.base import Source, find_shared
from seedpack.converter.sources.open import open_source
from seedpack.dtypes import PACKABLE, dtype_name, to_bytes, torch_dtype
from seedpack.errors import FormatError, ModelError, SeedpackError, first_line
from seedpack.formats import Checkpoint, CheckpointWriter, staged
from seedpack.formats.reader import QUANT_METHOD, read_json
from seedpack.formats.writer import SINGLE_FILE, file_bytes
from seedpack.hf.checkpoint_names import architecture
from seedpack.kernels.dispatch import Backend
from seedpack.keys import use_key
from seedpack.loader.dense import dense_forms, dense_tensors
from seedpack.loader.fill import fill_, use_int8_activations_
from seedpack.loader.save import raw_planned, stored_form

Model = str | Path | nn.Module | Mapping[str, Tensor] | Source


def _float_dtype(name: str) -> torch.dtype:
    try:
        dtype = torch_dtype(name)
    except FormatError:
        dtype = torch.uint8
    if dtype_name(dtype) not in PACKABLE:
        raise ModelError(f"dtype {name!r}: choose float32, float16, bfloat16 or float64")
    return dtype


def _require_apart(output: Path, source: Path) -> None:
    """Refuse an output that would take the place of the source, or of a folder that holds it."""
    target, origin = output.resolve(), source.resolve()
    if source.exists() and (target == origin or target in origin.parents):
        raise ModelError(f"{output}: is the model itself or holds it; name another output")


def _require_place(source: Source, output: Path) -> None:
    """Refuse an output that a model cannot become."""
    _require_apart(output, Path(source.name))
    if source.config is not None and output.suffix == ".safetensors":
        raise ModelError(f"{output}: a Hugging Face model becomes a folder; name one without .safetensors")


def plan_for(
    source: Source,
    *,
    codec: str | Codec = "trellis",
    bits: float | None = None,
    settings: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    plan: str | Path | Mapping[str, Any] | None = None,
    head_bits: int | None = None,
    target_size: int | None = None,
    costs: Sensitivities | None = None,
    hessians: Collection[str] = (),
) -> Plan:
    """The plan that `compress` would follow; arguments as there, and `costs` as for `budget.allocate`; `hessians` are the
    names of tensors that one is known for."""
    if target_size is not None and bits is not None:
        raise ModelError("give bits or a target size, not both")
    chosen = codec if isinstance(codec, Codec) else codec_for(codec, bits, settings or {})
    target = dtype_name(_float_dtype(dtype)) if dtype else None
    result = make_plan(source.tensors, source.shared, chosen, include=include, exclude=exclude, dtype=target)
    if target_size is not None:
        result = with_size(result, target_size, lambda p: _file_bytes(p.with_hessians(hessians)), head_bits, costs)
    elif isinstance(codec, str) or head_bits is not None:
        result = with_bits(result, bits, head_bits, costs)
    if plan is not None:
        result = result.edited_by_file(plan) if isinstance(plan, (str, Path)) else result.edited(plan)
    result.check_experts()
    return result


def calibrated_plan_for(
    source: Source,
    output: str | Path,
    calibration: Text | Calibration | None,
    *,
    allow_nonfinite: bool = False,
    device: str | torch.device = "cpu",
    watch_calibration: CalibrationWatch | None = None,
    **choice: Any,
) -> Plan:
    """The plan that `compress` would follow after calibration: a budget is spread by measured costs.

    Args:
        source: as for `plan_for`.
        output: what `compress` would write; Hessians are kept beside it, for that run to find.
        calibration: as for `compress`; so are allow_nonfinite, device and watch_calibration.
        choice: arguments of `plan_for`.
    """
    place, output = fitting_device(device), Path(output)
    _require_place(source, output)
    chosen, text = plan_for(source, **choice), calibration_of(calibration)
    return _measured(source, chosen, choice, text, {}, allow_nonfinite, output, place, watch_calibration)[0]


def _measured(
    source: Source, plan: Plan, choice: dict[str, Any], text: Calibration | None, importance: Mapping[str, Tensor],
    allow_nonfinite: bool, output: Path, device: torch.device, watch: CalibrationWatch | None,
) -> tuple[Plan, Found]:  # fmt: skip
    """A plan of usable tensors, a budget spread by measured costs if there is a text, and the Hessians."""
    plan = leave_nonfinite(source, plan, allow_nonfinite)
    found = calibrated(source, text, output, device, watch)
    inputs = Inputs(source, importance, found)
    if text is not None and (choice.get("target_size") is not None or is_budget(plan, choice.get("bits"))):
        costs = measured_costs(source, plan, text, inputs, output, device, watch)
        plan = plan_for(source, **choice, costs=costs, hessians=inputs.hessians(plan))
        plan = leave_nonfinite(source, plan, allow_nonfinite)
    plan = plan.with_hessians(inputs.hessians(plan))
    plan.check_experts()
    return plan, found


def _file_bytes(plan: Plan) -> int:
    return file_bytes([tensor.for_writer() for tensor in plan.tensors], plan.shared, WRITER)


def compress(
    model: Model,
    output: str | Path,
    *,
    codec: str | Codec = "trellis",
    bits: float | None = None,
    settings: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    plan: str | Path | Mapping[str, Any] | None = None,
    head_bits: int | None = None,
    target_size: int | None = None,
    importance: Mapping[str, Tensor] | None = None,
    calibration: Text | Calibration | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    shard_bytes: int | None = None,
    device: str | torch.device = "cpu",
    backend: Backend = "auto",
    watch: Watch | None = None,
    watch_calibration: CalibrationWatch | None = None,
) -> Report:
    """Pack a model into a seed + coefficient checkpoint.

    Args:
        model: a file, a Hugging Face folder, a hub id, a module or a state dict (see `open_source`).
        output: a file; for a Hugging Face model a folder. It appears whole or not at all.
        codec: a codec, its id, or "svd+seedlm".
        bits: bits a weight; default the codec's, 4. For trellis a whole number is the code bits of every tensor but
            the head; a fraction is a budget for all that is stored of the packed tensors, see `budget.allocate`.
        settings: hyperparameters of the codec by name.
        include: patterns of tensor names; given, only these are packed.
        exclude: patterns of tensor names to leave raw.
        dtype: of raw float tensors and decoded weights; default the source's.
        plan: a plan document or file (see `Plan.to_json`) whose choices win.
        head_bits: code bits of a language model's output head (and the embedding tied to it); default by `budget`.
        target_size: instead of bits, bytes of the file (of the weights, in a folder) to stay within.
        importance: per tensor name the weight of each input channel's error [in], or the Hessian E[x·xᵀ] of its layer's
            input [in, in]; default a guess where the codec has use for one: the power that the norm before a layer gives
            each channel, over the norm of its weights.
        calibration: run the model and make Hessians of its layers' inputs: "self" (a language model writes the text
            itself), a text or JSON lines file, a data set of the hub, token ids [n, context], batches for another module,
            or a `Calibration` that says more. They are kept in `seedpack-calibration` beside the output for other runs.
        force: replace an existing output.
        allow_nonfinite: store tensors with NaN or Inf raw instead of refusing them.
        shard_bytes: in a folder, start a new file before one exceeds this.
        device: where tensors are fitted, one at a time: "cpu", "cuda" or "cuda:1".
        backend: which kernels to use.
        watch: called with (tensor name, weights fitted since the last call).
        watch_calibration: called with (what is done, units done since the last call, units in all).

    Raises:
        NonfiniteError: naming the tensors.
        OutputError: the output exists or cannot be written; what was there is untouched.
    """
    started = time.perf_counter()
    place = fitting_device(device)
    source = model if isinstance(model, Source) else open_source(model)
    output = Path(output)
    _require_place(source, output)
    choice: dict[str, Any] = {
        "codec": codec, "bits": bits, "settings": settings, "include": include, "exclude": exclude, "dtype": dtype,
        "plan": plan, "head_bits": head_bits, "target_size": target_size,
    }  # fmt: skip
    chosen = plan_for(source, **choice)
    if unknown := sorted((importance or {}).keys() - {t.name for t in chosen.tensors}):
        raise ModelError(f"importance is given for {unknown[0]!r}, which the model has not")
    folder = source.config is not None
    if shard_bytes and not folder:
        raise ModelError("only a Hugging Face folder is split into shards; leave the shard size out")
    with staged(output, force=force, directory=folder) as partial:
        text = calibration_of(calibration)
        chosen, found = _measured(
            source, chosen, choice, text, importance or {}, allow_nonfinite, output, place, watch_calibration
        )
        if text is not None and text.sequential:
            found = calibrated_in_sequence(source, text, chosen, output, place, backend, watch_calibration)
        inputs = Inputs(source, importance or {}, found)
        journal = found.fitted if isinstance(found, Store) and not importance else None
        learnt = None
        if text is not None and text.tune:
            if journal is None:
                raise ModelError("tuning is for language models calibrated on text, without importance of your own")
            for tensor in chosen.tensors:
                fit(source, tensor, inputs, place, backend, watch, journal)
            learnt = tuned(source, text, chosen, inputs, journal, output, place, backend, watch_calibration)
        for file in source.files:
            shutil.copyfile(file, partial / file.name)
        planned = [tensor.for_writer() for tensor in chosen.tensors]
        reports = []
        writer = CheckpointWriter(partial, planned, chosen.shared, WRITER, folder=folder, shard_bytes=shard_bytes)
        with writer:
            for tensor in chosen.tensors:
                parts, report = fit(source, tensor, inputs, place, backend, None if learnt else watch, journal)
                if learnt is not None:
                    parts, report = retold(source, tensor, parts, report, learnt.factors, learnt.values)
                writer.write(tensor.name, {name: to_bytes(part) for name, part in parts.items()})
                if tensor.packed:
                    reports.append(report)
        if source.config is not None:
            quantization = {"quant_method": QUANT_METHOD, **writer.manifest.packed_only().to_json()}
            config = {**source.config, "quantization_config": quantization}
            if dtype:
                config = {k: v for k, v in config.items() if k != "torch_dtype"}
                config["dtype"] = str(_float_dtype(dtype)).removeprefix("torch.")
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        files = partial.glob("*.safetensors") if folder else [partial]
        size = sum(file.stat().st_size for file in files)
    if journal is not None:
        journal.clear()
    return Report(output, chosen, tuple(reports), size, time.perf_counter() - started)


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    dense: bool = False,
    dtype: str | torch.dtype | None = None,
    int8_activations: bool = False,
    fraction: float | None = None,
    key: bytes | None = None,
    **options: Any,
) -> Any:
    """Load a packed checkpoint.

    Args:
        path: a packed file or folder.
        model: fill this module, whose layers are packed in place, and return it. Needed for anything but a Hugging
            Face folder.
        dense: return a state dict of dense tensors instead.
        dtype: of dense tensors, or of a Hugging Face model's computation.
        int8_activations: round the input of packed linear layers to 8 bits where their codec can: faster on GPUs, for
            about 1% more error at 4 bits a weight.
        fraction: use no more than this share of the levels of tensors that have levels (`reparam.basis_`, codec svd); the
            file may be cut off behind them. For a module, or dense.
        key: the 16 bytes of a private key, for weights that are regenerated with one; known to the process from then on.
        options: for a Hugging Face folder, passed on to transformers' `from_pretrained` (device_map, …).

    Returns:
        The module, a transformers model, or a state dict.
    """
    if key is not None:
        with use_key(key):
            return load(
                path, model, dense=dense, dtype=dtype, int8_activations=int8_activations, fraction=fraction, **options
            )
    wanted = _float_dtype(dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if model is not None or dense:
        if dense and int8_activations:
            raise ModelError("dense tensors have no activations to round; leave int8_activations out")
        if options:
            raise ModelError(f"option {min(options)!r} is for Hugging Face folders loaded by transformers")
        with Checkpoint(path, fraction=fraction) as checkpoint:
            if model is None:
                tensors = dense_tensors(checkpoint, wanted if isinstance(wanted, torch.dtype) else None)
                return {name: tensor.clone() for name, tensor in tensors}
            fill_(model, checkpoint)
            if int8_activations:
                use_int8_activations_(model)
            return model
    if fraction is not None:
        raise ModelError("a fraction is for a module that is filled (model=net), or a dense state dict (dense=True)")
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        Checkpoint(path).close()  # a clear error for what is no checkpoint at all
        raise ModelError(
            f"{path}: is no Hugging Face folder; give the module to fill (seedpack.load(path, model=net)), "
            "or ask for a state dict (dense=True)"
        )
    config = read_json(config_file)
    with Checkpoint(path):
        pass
    import transformers

    cls = architecture(config) or transformers.AutoModel
    try:
        loaded = cls.from_pretrained(path, dtype=wanted if wanted is not None else "auto", **options)
    except (SeedpackError, OSError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(f"{path}: transformers cannot load it ({first_line(error)})") from error
    if int8_activations:
        use_int8_activations_(loaded)
    return loaded


def save(model: nn.Module, path: str | Path, *, force: bool = False) -> None:
    """Save a module with packed layers: parts as they are, other tensors raw.

    A transformers model becomes a folder by its own `save_pretrained`, anything else one file; so does a model that is
    reparametrised (`seedpack.reparam`) or has layers of `seedpack.nn`: seeds and coefficients under the dense names.
    """
    path = Path(path)
    stored = stored_form(model)
    save_pretrained: Any = getattr(model, "save_pretrained", None)
    if save_pretrained is not None and not stored.seeded:
        with staged(path, force=force, directory=True) as partial:
            save_pretrained(partial)
        return
    shared = find_shared((name, parts["weight"]) for name, parts in stored.parts.items())
    with staged(path, force=force) as partial:
        planned = [tensor for tensor in stored.planned if tensor.name not in shared]
        with CheckpointWriter(partial, planned, shared, WRITER, views=stored.views) as writer:
            for tensor in planned:
                writer.write(tensor.name, {part: to_bytes(value) for part, value in stored.parts[tensor.name].items()})


def unpack(
    path: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    fraction: float | None = None,
    force: bool = False,
) -> None:
    """Rebuild the dense model: a safetensors file, or a dense Hugging Face folder. One tensor is in memory at a time.

    A fraction is taken as `load` takes it.
    """
    path, output = Path(path), Path(output)
    wanted = _float_dtype(dtype) if dtype else None
    _require_apart(output, path)
    with (
        Checkpoint(path, fraction=fraction) as checkpoint,
        staged(output, force=force, directory=path.is_dir()) as partial,
    ):
        planned = [raw_planned(name, kind, shape) for name, kind, shape in dense_forms(checkpoint, wanted)]
        file = partial / SINGLE_FILE if path.is_dir() else partial
        with CheckpointWriter(file, planned, {}, WRITER, manifest=False) as writer:
            for name, tensor in dense_tensors(checkpoint, wanted):
                writer.write(name, {"weight": to_bytes(tensor)})
        if path.is_dir():
            _copy_dense_folder(path, partial, wanted)


def _copy_dense_folder(path: Path, partial: Path, wanted: torch.dtype | None) -> None:
    for other in path.iterdir():
        if other.is_file() and other.suffix != ".safetensors" and not other.name.endswith(".index.json"):
            shutil.copyfile(other, partial / other.name)
    config = read_json(partial / "config.json")
    if not isinstance(config, dict):
        raise FormatError(f"{path / 'config.json'}: expected a JSON object")
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict):
            holder.pop("quantization_config", None)
    if wanted is not None:
        config["dtype"] = str(wanted).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
