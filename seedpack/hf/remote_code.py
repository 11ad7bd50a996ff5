"""Models that are defined by Python code in their own folder: it runs only where the caller trusts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from seedpack.converter.trust import trusts_remote_code
from seedpack.errors import ModelError, first_line
from seedpack.hf.checkpoint_names import CheckpointNames, architecture
from seedpack.hf.quantization import strip_quantization


def model_class(path: Path, config: object, default: Any = None) -> Any:
    """Return what loads a folder's architecture by `from_pretrained`: a model class of transformers, or an Auto class.

    Args:
        path: the folder.
        config: its config.json.
        default: for an architecture that neither transformers nor the folder defines; AutoModel.

    Raises:
        ModelError: code of the folder defines it, which is not trusted.
    """
    import transformers

    own = _own_class(config)
    if own is not None and trusts_remote_code():
        return getattr(transformers, own)
    if own is not None and not _is_known(config):
        assert isinstance(config, dict)
        files = sorted({f"{str(name).rpartition('--')[2].partition('.')[0]}.py" for name in _references(config)})
        raise ModelError(
            f"{path}: the model is defined by Python code in its own folder ({', '.join(files)}), which runs only if you trust "
            "it: read it, then pass trust_remote_code=True (--trust-remote-code)"
        )
    return architecture(config) or default or transformers.AutoModel


def names_of_folder(path: Path, config: object) -> CheckpointNames:
    """Build the model of a folder on the meta device, by the folder's own code where that is trusted."""
    import transformers

    auto = model_class(path, config)
    if _own_class(config) is None or not trusts_remote_code():
        return CheckpointNames.of_folder(path)
    try:
        loaded = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
        strip_quantization(loaded)
        with torch.device("meta"):
            model = auto.from_config(loaded, trust_remote_code=True)
    except Exception as error:  # foreign code
        raise ModelError(f"{path}: the folder's own code cannot build its model ({first_line(error)})") from None
    return CheckpointNames(model)


def _own_class(config: object) -> str | None:
    """Return the Auto class that loads the model which a folder's own code defines; None if it defines none."""
    own = config.get("auto_map") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(own, dict):
        return None
    models = sorted(key for key in own if key.startswith("AutoModel"))
    wanted = (config.get("architectures") or [None])[0]
    fitting = [key for key in models if str(own[key]).rpartition(".")[2] == wanted]
    return next(iter([*fitting, *models]), None)


def _references(config: dict[str, Any]) -> list[Any]:
    return [value for value in config["auto_map"].values() if isinstance(value, str)]


def _is_known(config: object) -> bool:
    """Return whether transformers has code of its own for a config."""
    import transformers

    return isinstance(config, dict) and config.get("model_type") in transformers.CONFIG_MAPPING
