"""Mistakes that can be told from the arguments alone, before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seedpack.codecs.names import codec_ids, require_bits
from seedpack.converter.sources.paths import require_path_or_id
from seedpack.errors import CodecError, ModelError, OptionError, OutputError
from seedpack.formats import Checkpoint
from seedpack.formats.places import is_remote
from seedpack.formats.staging import exists_already, require_name


def check_compress(
    model: str,
    output: str | None,
    *,
    codec: str,
    bits: float | None,
    target_size: object = None,
    head_bits: float | None = None,
    force: bool = False,
    **_: Any,
) -> None:
    """Refuse arguments of `compress` that cannot work.

    Raises:
        ModelError: there is no such file or folder, and it cannot be an id of the hub.
        OutputError: the output exists.
        OptionError: the codec is unknown, the bits are out of its range, or options exclude each other.
    """
    check_codec(codec, bits)
    if bits is not None and target_size is not None:
        raise OptionError("give bits or a target size, not both")
    if head_bits is not None and not 1 <= head_bits <= 8:
        raise OptionError(f"head_bits must be from 1 to 8, got {head_bits:g}")
    require_path_or_id(model)
    if is_remote(model) or (output is not None and is_remote(output)):
        return  # the run looks there
    is_file = Path(model).is_file()
    into_folder = (
        is_file and output is not None and Path(output).is_dir() and not (Path(output) / "config.json").exists()
    )
    if output is not None and not into_folder:
        check_output(Path(output), force, is_folder=not is_file or model.endswith(".gguf"))


def check_output(path: Path, force: bool, *, is_folder: bool) -> None:
    """Refuse an output that exists, or whose name says another format."""
    require_name(path, is_folder=is_folder)
    if is_remote(path):
        return  # the run looks there
    if path.exists() and not force:
        raise OutputError(exists_already(path))


def check_codec(codec: str, bits: float | None) -> None:
    """Refuse an unknown codec (an id, or svd+id), and bits per weight that it does not take."""
    known = codec_ids()
    for name in codec.split("+", 1):
        if name not in known:
            raise OptionError(
                f"unknown codec {name!r}; known: {', '.join(known)}; install the package that provides it"
            )
    if bits is not None:
        try:
            require_bits(codec, bits)
        except CodecError as error:
            raise OptionError(str(error)) from None


def check_packed(path: Path, fraction: float | None = None) -> None:
    """Refuse what is not packed, or breaks a rule of the format in its header."""
    Checkpoint(path, fraction=fraction).close()


def check_folder(path: Path) -> None:
    """Refuse what is not a Hugging Face folder, packed or dense."""
    if not (path / "config.json").is_file():
        check_packed(path)
        raise ModelError(f"{path}: not a Hugging Face folder, which has a config.json")
