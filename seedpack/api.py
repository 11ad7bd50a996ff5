"""The few public verbs: compress and plan, load, save, unpack."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seedpack.converter.options import float_dtype
from seedpack.converter.pipeline import compress as compress
from seedpack.converter.pipeline import plan as plan
from seedpack.errors import ModelError
from seedpack.formats import Checkpoint, staged
from seedpack.formats.staging import require_apart, require_name
from seedpack.formats.writer import SINGLE_FILE
from seedpack.hf.filled import attach_manifest_
from seedpack.hf.folder import complete_dense_folder
from seedpack.hf.loading import load_pretrained
from seedpack.keys import use_key
from seedpack.loader.dense import dense_state
from seedpack.loader.fill import copy_, fill_, use_int8_activations_
from seedpack.loader.save import save_module
from seedpack.loader.unpack import write_dense


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    dense: bool = False,
    dtype: str | torch.dtype | None = None,
    int8_activations: bool | None = None,
    fraction: float | None = None,
    key: bytes | None = None,
    copy: bool = False,
    max_bytes: int | None = None,
    **options: Any,
) -> Any:
    """Load a packed checkpoint.

    Args:
        path: a packed file or folder.
        model: fill this module, whose layers are packed in place, and return it. Needed for anything but a Hugging
            Face folder.
        dense: return a state dict of dense tensors instead.
        dtype: of dense tensors, or of a Hugging Face model's computation.
        int8_activations: round the input of packed linear layers to 8 bits where their codec can: faster, for about 1%
            more error at 4 bits per weight. By default on the CPU for up to 8 tokens, up to 4 bits; for more where the processor
            has VNNI (then the weight has 8 bits too), up to 3 bits. False: never.
        fraction: use no more than this share of the levels of tensors that have levels (`reparam.basis_`, codec svd); the
            file may be cut off behind them. For a module, or dense.
        key: the 16 bytes of a private key, for weights that are regenerated with one; known to the process from then on.
        copy: give the module memory of its own. By default packed layers are views of the file, mapped into memory: replace it
            only by renaming another into its place, as seedpack does. Who writes into it changes the live weights.
        max_bytes: that decoding may take, of files that you trust: a tensor that cannot stay packed, or all of a dense
            state dict. By default 1 GB, or 1,024 times the file if that is more, and no more than is free.
        options: for a Hugging Face folder, passed on to transformers' `from_pretrained` (device_map, …).

    Returns:
        The module, a transformers model, or a state dict.

    Raises:
        FormatError: the bytes break a rule of docs/format.md. Digests are compared (`DigestError`) unless the environment
            variable SEEDPACK_VERIFY is 0.
        ModelError: the file and the model do not have the same tensors, or arguments do not go together.
        LimitError: it takes more than `max_bytes`; nothing was decoded.
    """
    target = dtype if dtype is None or dtype == "auto" else float_dtype(dtype)
    reading: dict[str, Any] = {"fraction": fraction, "max_bytes": max_bytes}
    _check_load(Path(path), model, dense, int8_activations, reading, options)
    with ExitStack() as stack:
        if key is not None:
            stack.enter_context(use_key(key))
        if model is None and not dense:
            model = load_pretrained(Path(path), "auto" if target is None else target, **options)
        else:
            checkpoint = stack.enter_context(Checkpoint(path, **reading))
            if model is None:
                return dense_state(checkpoint, target if isinstance(target, torch.dtype) else None)
            stored = fill_(model, checkpoint)
            if fraction is None:
                attach_manifest_(model, checkpoint.manifest, stored)
        if copy:
            copy_(model)
        if int8_activations is not None:
            use_int8_activations_(model, int8_activations)
        return model


def _check_load(
    path: Path,
    model: nn.Module | None,
    dense: bool,
    int8: bool | None,
    reading: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Refuse arguments of `load` that do not go together, and files that it cannot load so."""
    if model is not None and not isinstance(model, nn.Module):
        raise ModelError(f"model: expected a module to fill, got {model!r}; make one first (net = Net())")
    if model is not None or dense:
        if dense and int8 is not None:
            raise ModelError("dense tensors have no activations to round; leave int8_activations out")
        if options:
            raise ModelError(f"option {min(options)!r} is for Hugging Face folders loaded by transformers")
        return
    for option, value in reading.items():
        if value is not None:
            raise ModelError(f"{option} is for a module that is filled (model=net), or a dense state dict (dense=True)")
    if not (path / "config.json").is_file():
        Checkpoint(path).close()  # a clear error for what is no checkpoint at all
        raise ModelError(
            f"{path}: not a Hugging Face folder; give the module to fill (seedpack.load(path, model=net)), "
            "or ask for a state dict (dense=True)"
        )


def save(model: nn.Module, path: str | Path, *, force: bool = False) -> None:
    """Save a module with packed layers: parts as they are, other tensors raw.

    A transformers model becomes a folder by its own `save_pretrained`, anything else one file; so does a model that is
    reparametrised (`seedpack.reparam`) or has layers of `seedpack.nn`: seeds and coefficients under the dense names.
    """
    save_module(model, Path(path), force=force)


def unpack(
    path: str | Path,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    fraction: float | None = None,
    key: bytes | None = None,
    max_bytes: int | None = None,
    force: bool = False,
) -> None:
    """Rebuild the dense model: a safetensors file, or a dense Hugging Face folder. One tensor is in memory at a time.

    Args:
        path: a packed file or folder.
        output: the file or folder to write.
        dtype: of float tensors; default each tensor's own.
        fraction: as `load` takes it.
        key: as `load` takes it.
        max_bytes: as `load` takes it, of a tensor; the dense file may take as much on the disk.
        force: replace an existing output.

    Raises:
        LimitError: it takes more than `max_bytes`; nothing was decoded.
    """
    path, output = Path(path), Path(output)
    target, folder = float_dtype(dtype) if dtype else None, path.is_dir()
    require_apart(output, path)
    require_name(output, is_folder=folder)
    with ExitStack() as stack:
        if key is not None:
            stack.enter_context(use_key(key))
        checkpoint = stack.enter_context(Checkpoint(path, fraction=fraction, max_bytes=max_bytes))
        partial = stack.enter_context(staged(output, force=force, directory=folder))
        write_dense(checkpoint, partial / SINGLE_FILE if folder else partial, target)
        if folder:
            complete_dense_folder(path, partial, target)
