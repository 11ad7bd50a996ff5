"""The `quantization_config` of a packed model: the manifest of its packed tensors."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from seedpack.errors import ModelError
from seedpack.formats.manifest import Manifest, manifest_from_json
from seedpack.formats.reader import QUANT_METHOD


class SeedpackConfig(QuantizationConfigMixin):
    """The manifest of config.json, checked."""

    def __init__(self, /, **document: Any):
        document.pop("quant_method", None)
        self.quant_method: str = QUANT_METHOD  # type: ignore[assignment]
        self.manifest: Manifest = manifest_from_json(document, "config.json: quantization_config")
        if self.manifest.views:
            raise ModelError(
                "config.json: quantization_config: tensors that are pieces of stored ones are not loaded by transformers; "
                "build the model and fill it with seedpack.load(path, model=model)"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make one from the JSON object, for transformers; unknown keys are refused, never dropped."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {"quant_method": self.quant_method, **self.manifest.to_json()}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the whole JSON object: there are no defaults to leave out."""
        return self.to_dict()

    def __repr__(self) -> str:
        """Return a short text: the document can have thousands of lines."""
        return f"SeedpackConfig({len(self.manifest.tensors)} packed tensors)"
