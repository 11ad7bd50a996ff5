"""Keep what goes beside the packed weights of a model that came from no folder: config, generation config and tokenizer."""

from __future__ import annotations

import copy
import json
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

from seedpack.errors import ModelError
from seedpack.formats import Manifest
from seedpack.formats.record import file_digest
from seedpack.hf.folder import copy_files, write_packed_config
from seedpack.hf.language_model import tokenizer_of
from seedpack.hf.quantization import strip_quantization


class Beside:
    """A temporary folder with these files, which goes with this object.

    Args:
        model: of transformers, loaded or on the meta device.
    """

    def __init__(self, model: Any):
        holder = tempfile.TemporaryDirectory(prefix="seedpack-beside-")
        weakref.finalize(self, holder.cleanup)
        self._path, self._tokenizer = Path(holder.name), None
        config = copy.deepcopy(model.config)
        strip_quantization(config)
        config.dtype = model.dtype
        config.save_pretrained(self._path)
        if model.can_generate():  # as it is: saving it by its own method refuses some that models come with
            model.generation_config.to_json_file(self._path / "generation_config.json")
        saved: dict[str, Any] = json.loads((self._path / "config.json").read_text())
        self.config = {**saved, "architectures": [type(model).__name__]}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was taken, or None."""
        return self._tokenizer or tokenizer_of(self._path)

    def take_tokenizer(self, tokenizer: Any) -> None:
        """Put a tokenizer, or a processor, beside the packed weights.

        Raises:
            ModelError: this is none.
        """
        if not hasattr(tokenizer, "save_pretrained"):
            raise ModelError(f"tokenizer: expected one of transformers, got a {type(tokenizer).__name__}")
        tokenizer.save_pretrained(self._path)
        self._tokenizer = tokenizer

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the files, by name."""
        return {file.name: file_digest(file) for file in sorted(self._path.iterdir())}

    def write(self, folder: Path, manifest: Manifest, dtype: torch.dtype | None) -> None:
        """Write config.json, and what else is here, into the folder of the packed weights."""
        write_packed_config(folder, self.config, manifest, dtype)
        copy_files(self._path, (file.name for file in self._path.iterdir() if file.name != "config.json"), folder)
