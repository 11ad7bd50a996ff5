"""The `quantization_config` of a packed model: the manifest of its packed tensors; or what a dense one is to be packed by."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from seedpack.codecs.registry import codec_from_spec
from seedpack.converter.options import CompressOptions
from seedpack.errors import ModelError
from seedpack.formats.manifest import Manifest
from seedpack.formats.reader import QUANT_METHOD, manifest_of_quantization
from seedpack.loader.layers import codec_matrix

MEANINGLESS = {
    "dtype": "say dtype=… to from_pretrained",
    "force": "nothing is replaced",
    "shard_bytes": "nothing is kept",
    "state_key": "it is for files of torch alone",
}


def whole_bits(manifest: Manifest) -> int:
    """Return the bits per packed weight, to the nearest whole number."""
    stored = weights = 0.0
    for name, entry in manifest.tensors.items():
        codec, matrix = codec_from_spec(manifest.codec_of(name)), codec_matrix(entry.shape, entry.transposed)
        stored += codec.bits_per_weight(matrix) * math.prod(matrix)
        weights += math.prod(matrix)
    return round(stored / max(1.0, weights))


def quantization_of(manifest: Manifest) -> dict[str, Any]:
    """Return the `quantization_config` of packed tensors: their manifest, and the bits per weight for the hub's page."""
    return {"quant_method": QUANT_METHOD, "bits": whole_bits(manifest), **manifest.to_json()}


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
        config = cls.of(manifest_of_quantization(config_dict, "config.json: quantization_config"))
        return (config, kwargs) if return_unused_kwargs else config

    @property
    def bits(self) -> int:
        """The bits per packed weight, to the nearest whole number."""
        return whole_bits(self.manifest)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        if self.options is None:
            return quantization_of(self.manifest)
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
