"""Statistics on disk: made once for a model and a text, used by every run after, and where an interrupted one goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from seedpack.converter.journal import write_file
from seedpack.converter.snapshot import Snapshot
from seedpack.errors import ModelError
from seedpack.formats.lock import LOCK_FILE
from seedpack.formats.reader import read_json

VERSION = 5  # 1: texts without the token that a tokenizer puts first; 2: a model wrote without a token drawn for each sequence; 3: in
# float32, by other numbers; 4: by its generation config, and layers that share keys and values had those of other sequences

UNCLAIMED = "unclaimed"  # a file that is there while nobody has asked that the folder stay


class Store:
    """A folder of input second moments.

    `index.json` holds what they were made of, and for each weight the file and the name in it. `output-….safetensors` is
    the output of the last layer that is done, until all are.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any]):
        self.folder = folder
        self._index: dict[str, Any] = {"made_of": dict(made_of), "layers": [], "weights": {}}
        if (folder / "index.json").is_file():
            found: Any = read_json(folder / "index.json")
            if not _sound(found) or found.get("made_of") != self._index["made_of"]:
                raise ModelError(f"{folder}: holds another calibration; delete that folder")
            self._index = found

    @property
    def complete(self) -> bool:
        """True if all layers are there."""
        return "" in self._index["layers"]

    @property
    def done(self) -> int:
        """The number of layers that are there."""
        return len(self._index["layers"])

    def add(self, layer: str, moments: Mapping[str, Tensor], output: Tensor | None) -> None:
        """Keep a layer's moments by the names of weights, and its output to go on from; "" is the last one."""
        file = f"layer-{self.done:04d}.safetensors"
        firsts: dict[int, str] = {}
        for name, value in moments.items():
            firsts.setdefault(id(value), name)
        self._save({name: moments[name] for name in firsts.values()}, file)
        if output is not None:
            self._save({"output": output.contiguous()}, f"output-{self.done:04d}.safetensors")
        self._index["weights"] |= {name: [file, firsts[id(value)]] for name, value in moments.items()}
        self._index["layers"].append(layer)
        text = json.dumps(self._index, indent=1)
        write_file(self.folder / "index.json", lambda path: path.write_text(text))
        last = self.done - 1
        for old in self.folder.glob("output-*.safetensors"):
            if not layer or old.name != f"output-{last:04d}.safetensors":
                old.unlink(missing_ok=True)

    def skip(self, layer: str, hidden: Tensor) -> Tensor | None:
        """Return the output of a layer that is done, or None.

        Only the last one's is kept. For those before it the layer's own input is returned, a placeholder of the right
        shape: nothing that comes of it is used, as the next layers are done too.
        """
        done = self._index["layers"]
        if layer not in done:
            return None
        if layer != done[-1]:
            return hidden
        return self.tensor(f"output-{len(done) - 1:04d}.safetensors", "output").to(hidden.device)

    def __contains__(self, weight: object) -> bool:
        return weight in self._index["weights"]

    def get(self, weight: str) -> Tensor | None:
        """Return the second moment of a weight's input, float32 [in, in], if it has one."""
        where = self._index["weights"].get(weight)
        return None if where is None else self.tensor(*where)

    def save_tokens(self, tokens: Tensor) -> None:
        """Keep the text that the model wrote."""
        self._save({"tokens": tokens}, "tokens.safetensors")

    def tokens(self) -> Tensor | None:
        """Return the text that the model wrote, if it is there."""
        return self.tensor("tokens.safetensors", "tokens") if (self.folder / "tokens.safetensors").is_file() else None

    def snapshot(self, work: str, device: str) -> Snapshot:
        """Return the state of work that has not ended, which one kind of device does."""
        return Snapshot(self.folder / f"{work}.begun", device)

    def tensor(self, file: str, name: str) -> Tensor:
        """Read one tensor of one of the folder's files."""
        return self._read(file, name)[name]

    def claim(self, *, for_others: bool) -> None:
        """Say whether the folder is to stay for other runs; what one run has asked for stays."""
        if for_others:
            (self.folder / UNCLAIMED).unlink(missing_ok=True)
        elif not any(path.name != LOCK_FILE for path in self.folder.iterdir()):
            (self.folder / UNCLAIMED).touch()

    def _read(self, file: str, *names: str) -> dict[str, Tensor]:
        """Read some tensors of a file, or all."""
        try:
            with safe_open(self.folder / file, "pt") as tensors:
                return {name: tensors.get_tensor(name) for name in names or tensors.keys()}
        except Exception as error:  # the library's own, which differ by version
            raise ModelError(f"{self.folder / file}: cannot be read ({error}); delete that folder") from None

    def _save(self, tensors: dict[str, Tensor], file: str) -> None:
        write_file(self.folder / file, lambda path: save_file(tensors, path))


def remove_unclaimed(folder: Path) -> None:
    """Remove a store's folder, and the one that it is in if it was the last there, unless it is to stay."""
    if (folder / UNCLAIMED).exists():
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()


def _sound(index: Any) -> bool:
    """Return whether a document has an index's form, and names no file elsewhere."""
    kinds = {"layers": list, "weights": dict}
    if not isinstance(index, dict) or not all(isinstance(index.get(key), kind) for key, kind in kinds.items()):
        return False

    def is_place(where: Any) -> bool:
        named = isinstance(where, list) and len(where) == 2 and all(isinstance(text, str) for text in where)
        return named and Path(where[0]).name == where[0]

    return all(map(is_place, index["weights"].values()))
