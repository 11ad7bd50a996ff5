"""The `quantization_config` of a packed model: the manifest of its packed tensors; or what a dense one is to be packed by."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from seedpack.converter.options import CompressOptions
from seedpack.errors import ModelError
from seedpack.formats.manifest import Manifest, manifest_from_json
from seedpack.formats.reader import QUANT_METHOD

MEANINGLESS = {
    "dtype": "say dtype=… to from_pretrained",
    "force": "nothing is replaced",
    "shard_bytes": "nothing is kept",
    "state_key": "it is for files of torch alone",
}


class SeedpackConfig(QuantizationConfigMixin):
    """Pack a dense model while transformers loads it, as `compress` does with the same options.

    >>> AutoModelForCausalLM.from_pretrained(name, quantization_config=SeedpackConfig(bits=4))  # doctest: +SKIP

    What is packed already has its own: the manifest that is in its config.json.

    Args:
        options: of `CompressOptions`, as bits=4 or calibration="self".
    """

    manifest: Manifest
    options: CompressOptions | None

    def __init__(self, /, **options: Any):
        self.quant_method: str = QUANT_METHOD  # type: ignore[assignment]
        if unused := sorted(options.keys() & MEANINGLESS.keys()):
            raise ModelError(f"SeedpackConfig: {unused[0]} has no effect here; {MEANINGLESS[unused[0]]}")
        self.options = CompressOptions.of(None, options)

    @classmethod
    def of(cls, manifest: Manifest) -> SeedpackConfig:
        """Return the config of a packed model.

        Raises:
            ModelError: transformers could not load it.
        """
        if manifest.views:
            raise ModelError(
                "config.json: quantization_config: tensors that are pieces of stored ones are not loaded by transformers; "
                "build the model and fill it with seedpack.load(path, model=model)"
            )
        config = cls()
        config.manifest, config.options = manifest, None
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make one from the JSON object, for transformers; unknown keys are refused, never dropped."""
        document = {key: value for key, value in config_dict.items() if key != "quant_method"}
        config = cls.of(manifest_from_json(document, "config.json: quantization_config"))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        if self.options is None:
            return {"quant_method": self.quant_method, **self.manifest.to_json()}
        chosen = {field.name: getattr(self.options, field.name) for field in fields(self.options) if field.repr}
        if isinstance(settings := chosen["settings"], dict):
            chosen["settings"] = {name: value for name, value in settings.items() if name != "key"}
        defaults = vars(CompressOptions())
        plain = {
            name: value for name, value in chosen.items() if isinstance(value, (str, float, bool, list, tuple, dict))
        }
        return {"quant_method": self.quant_method} | {k: v for k, v in plain.items() if v != defaults[k]}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the whole JSON object: there are no defaults to leave out."""
        return self.to_dict()

    def __repr__(self) -> str:
        """Return a short text: the document can have thousands of lines."""
        what = f"{len(self.manifest.tensors)} packed tensors" if self.options is None else str(self.options)
        return f"SeedpackConfig({what})"
