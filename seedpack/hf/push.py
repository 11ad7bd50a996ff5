"""The way of a packed folder to the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seedpack._version import __version__
from seedpack.converter.journal import write_file
from seedpack.errors import ModelError, first_line
from seedpack.formats import Checkpoint
from seedpack.formats.record import write_record
from seedpack.hf.card import require_recorded
from seedpack.hf.folder import read_config
from seedpack.hf.internals import auto_class_names
from seedpack.hf.tasks import TASKS

CODE = "modeling_seedpack.py"
MODELLING = '''"""Loads the packed model: seedpack makes transformers know its weights."""
import transformers
try:
    import seedpack
except ImportError as error:
    raise ImportError("this model is packed by seedpack: pip install seedpack-torch") from error
{names}
'''


def write_code(folder: str | Path) -> None:
    """Write a modelling file of a few lines, so that transformers with trust_remote_code=True says what is missing, and loads.

    Without it, and without seedpack, transformers refuses the folder too, by the shapes of its weights.
    """
    path = Path(folder)
    require_recorded(path)
    config = read_config(path)
    classes = [name for name in config.get("architectures") or [] if isinstance(name, str)]
    names = {
        auto: f"{CODE.removesuffix('.py')}.{cls}"
        for cls in classes
        for auto, mappings in TASKS.values()
        if any(cls in auto_class_names(mapping) for mapping in mappings)
    }
    if "auto_map" in config or not names:
        raise ModelError(
            f"{path}: has modelling code of its own, or no architecture that transformers knows; leave the code out"
        )
    known = sorted(
        {name.rpartition(".")[2] for name in names.values()}
    )  # of transformers: what a config says is no code
    text = MODELLING.format(names="\n".join(f"{cls} = transformers.{cls}" for cls in known))
    write_file(path / CODE, lambda partial: partial.write_text(text))
    document = json.dumps({**config, "auto_map": names}, indent=2) + "\n"
    write_file(path / "config.json", lambda partial: partial.write_text(document))
    write_record(path)


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a packed folder to the hub, and return its address there (huggingface_hub honours HF_TOKEN, HF_ENDPOINT, …).

    Args:
        folder: as `compress` writes it; its files are checked against its record first.
        repo: the hub id, which is made if there is none.
        private: make it so.

    Raises:
        ModelError: the hub cannot be reached, or refuses it.
        DigestError: a file was changed since it was written.
    """
    path = Path(folder)
    require_recorded(path)
    with Checkpoint(path) as checkpoint:
        for _, error in checkpoint.verify():
            if error is not None:
                raise error
    api = make_repository(repo, private=private)
    with _refusals(repo):
        api.upload_folder(
            folder_path=path, repo_id=repo, commit_message=f"Upload a model packed by seedpack {__version__}"
        )
    return f"{api.endpoint}/{repo}"


def make_repository(repo: str, *, private: bool = False) -> Any:
    """Make a repository of the hub, if there is none, and return the hub's API.

    Raises:
        ModelError: the hub cannot be reached, or refuses it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _refusals(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        api.auth_check(repo, write=True)
    return api


@contextmanager
def _refusals(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise ModelError(
            f"{repo}: cannot be uploaded ({type(error).__name__}: {first_line(error)}); check the name, the token "
            "(hf auth login) and the network"
        ) from error
