"""Models by hub id."""

from __future__ import annotations

from pathlib import Path

from seedpack.converter.trust import trusts_remote_code
from seedpack.errors import ModelError, first_line
from seedpack.hf.folder import sentence_modules

WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]
OLD_WEIGHTS = ["pytorch_model*.bin"]
SUBFOLDERS = ["*/*.safetensors", "*/*.bin"]  # other forms of the weights, and the modules of sentence-transformers


def download(repo: str) -> Path:
    """Return the folder of a hub model, from the cache or the hub (huggingface_hub honours HF_HOME, HF_HUB_OFFLINE, …)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [*WANTED, "*.py"] if trusts_remote_code() else WANTED
    try:
        folder = Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns=SUBFOLDERS))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo, allow_patterns=wanted + OLD_WEIGHTS, ignore_patterns=SUBFOLDERS))
        if modules := sentence_modules(folder):
            folder = Path(snapshot_download(repo, allow_patterns=[f"{module}/*" for module in modules]))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{repo}: no such file or folder here, and as a hub id it cannot be fetched "
            f"({type(error).__name__}: {first_line(error)}); check the name and the network"
        ) from None
