"""The task that a transformers model is for, told from its configuration, and models loaded for it.

Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seedpack.converter.trust import trusts_remote_code
from seedpack.errors import ModelError, SeedpackError, first_line
from seedpack.formats.reader import read_json
from seedpack.hf.internals import auto_class_names

LANGUAGE, SEQ2SEQ, EMBEDDINGS = "language-modeling", "seq2seq", "embeddings"
TEXT_CLASSES, IMAGE_CLASSES = "text-classification", "image-classification"
TASKS = {  # the Auto class that loads a model, and the mappings that name models for the task; the first that fits is taken
    TEXT_CLASSES: ("AutoModelForSequenceClassification", ("FOR_SEQUENCE_CLASSIFICATION_",)),
    IMAGE_CLASSES: ("AutoModelForImageClassification", ("FOR_IMAGE_CLASSIFICATION_",)),
    SEQ2SEQ: ("AutoModelForSeq2SeqLM", ("FOR_SEQ_TO_SEQ_CAUSAL_LM_",)),
    LANGUAGE: ("AutoModelForCausalLM", ("FOR_CAUSAL_LM_",)),
    EMBEDDINGS: ("AutoModel", ("FOR_MASKED_LM_", "FOR_TEXT_ENCODING_", "")),
}
POOLING_FILE = "1_Pooling/config.json"
POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "lasttoken"}


def task_of(model: str | Path) -> str:
    """Return the task of a model: one of `TASKS`.

    Args:
        model: a folder (dense or packed), a GGUF file, which holds a language model, or a hub id.

    Raises:
        ModelError: nothing is there, or it is for none of the tasks.
    """
    if _is_gguf(model):
        return LANGUAGE
    cls = _model_class(model)
    if _find_file(model, POOLING_FILE):
        return EMBEDDINGS
    if task := _task_of_class(cls):
        return task
    what = f"a {cls.__name__}" if _is_named(cls) else "an architecture that config.json does not name"
    raise ModelError(
        f"{model}: {what} is for none of the tasks {', '.join(TASKS)}; --task chooses one, "
        f"such as {EMBEDDINGS} of any model that reads text"
    )


def load_for_task(model: str | Path, task: str, dtype: Any = None) -> Any:
    """Load a model for a task, by the class that its configuration names where that is for the task.

    Args:
        model: as `task_of` takes it.
        task: one of `TASKS`; of `EMBEDDINGS` any model of text.
        dtype: of the computation; float32 by default.

    Raises:
        ModelError: nothing is there, or transformers cannot load it for the task.
    """
    import torch
    import transformers

    import seedpack  # noqa: F401 (registers the quantizer)
    from seedpack.hf.complete import load_complete

    auto = getattr(transformers, TASKS[task][0])
    where, options = _where(model)
    if not options:
        own = _model_class(model)
        auto = own if task == _task_of_class(own) or (task == EMBEDDINGS and _is_named(own)) else auto
    trusted = {"trust_remote_code": trusts_remote_code()}
    try:
        return load_complete(auto, where, model, dtype=dtype or torch.float32, **options, **trusted)
    except (SeedpackError, MemoryError):
        raise
    except Exception as error:  # transformers' own
        raise ModelError(f"{model}: transformers cannot load it for {task} ({first_line(error)})") from error


def load_processor(model: str | Path, task: str) -> Any:
    """Load what turns texts or images into a model's inputs: a tokenizer, or an image processor.

    Raises:
        ModelError: the model has none that transformers can load.
    """
    import transformers

    auto = transformers.AutoImageProcessor if task == IMAGE_CLASSES else transformers.AutoTokenizer
    where, options = _where(model)
    try:
        return auto.from_pretrained(where, trust_remote_code=trusts_remote_code(), **options)
    except Exception as error:  # transformers fails in many ways where files are missing
        kind = "image processor" if task == IMAGE_CLASSES else "tokenizer"
        raise ModelError(f"{model}: no {kind} that transformers can load ({first_line(error)})") from error


def pooling_of(model: str | Path) -> str:
    """Return how a model's embeddings are pooled, "mean", "cls" or "lasttoken", as a folder of sentence-transformers says.

    Raises:
        ModelError: they are pooled in another way.
    """
    file = _find_file(model, POOLING_FILE)
    if file is None:
        return "mean"
    content = read_json(file)
    config: dict[str, Any] = content if isinstance(content, dict) else {}
    modes = (key.partition("pooling_mode_")[2] for key, value in config.items() if value)
    names: list[str] = [POOLINGS.get(mode, mode) for mode in modes if mode]
    names = [str(config["pooling_mode"])] if "pooling_mode" in config else names
    if len(names) != 1 or names[0] not in POOLINGS.values():
        raise ModelError(
            f"{file}: pooling {'+'.join(names) or 'missing'}; expected one of {', '.join(POOLINGS.values())}"
        )
    return names[0]


def _task_of_class(cls: Any) -> str | None:
    """Return the task of a model class or an Auto class, or None."""
    if not hasattr(cls, "main_input_name"):
        autos = {auto: task for task, (auto, _) in TASKS.items()} | {"AutoModelForMaskedLM": EMBEDDINGS}
        return autos.get(cls.__name__)
    for task, (_, mappings) in TASKS.items():
        if any(cls.__name__ in auto_class_names(mapping) for mapping in mappings):
            return task if _reads_what_is_given(cls, task) else None
    return None


def _is_named(cls: Any) -> bool:
    """Return whether `_model_class` found a class, instead of falling back on that of all models."""
    return bool(cls.__name__ != "PreTrainedModel")


def _reads_what_is_given(cls: Any, task: str) -> bool:
    """Return whether a model class reads images where the task gives images, and else text alone."""
    config, pixels = cls.config_class, task == IMAGE_CLASSES
    if task == SEQ2SEQ and not config.is_encoder_decoder:  # such as language models that listen
        return False
    if task == EMBEDDINGS and not {"vision_config", "audio_config"}.isdisjoint(config.sub_configs):
        return False
    return bool(cls.main_input_name == ("pixel_values" if pixels else "input_ids"))


def _model_class(model: str | Path) -> Any:
    """Return the class that a model's config.json names, as `remote_code.model_class` does; `PreTrainedModel` if none."""
    import transformers

    from seedpack.converter.sources.open import looks_like_hub_id
    from seedpack.hf.remote_code import model_class

    if not Path(model).exists() and not looks_like_hub_id(str(model)):
        raise ModelError(f"{model}: no such file or folder, and not a hub id (org/name)")
    file = _find_file(model, "config.json")
    if file is None:
        raise ModelError(
            f"{model}: no config.json to be had; expected a Hugging Face folder, a hub id or, of a language model, a GGUF file"
        )
    return model_class(Path(model), read_json(file), transformers.PreTrainedModel)


def _find_file(model: str | Path, name: str) -> Path | None:
    """Return a file of a model's folder, or of a hub model, fetched; None if it has none."""
    if Path(model).exists():
        return file if (file := Path(model) / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(str(model), name))
    except (HfHubHTTPError, HFValidationError, OSError):
        return None


def _where(model: str | Path) -> tuple[str, dict[str, Any]]:
    """Return what `from_pretrained` takes for a model: where it is, and options."""
    if _is_gguf(model):
        return str(Path(model).parent), {"gguf_file": Path(model).name}
    return str(model), {}


def _is_gguf(model: str | Path) -> bool:
    return str(model).lower().endswith(".gguf") and Path(model).is_file()
