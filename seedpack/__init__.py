"""Compress pretrained models into seed + coefficient checkpoints, and run them packed.

>>> import seedpack
>>> seedpack.compress("model.safetensors", "packed.safetensors", bits=4)  # doctest: +SKIP
>>> seedpack.load("packed.safetensors", model=net)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from seedpack._version import __version__ as __version__
from seedpack.errors import SeedpackError as SeedpackError
from seedpack.hf.register import install as _install

if TYPE_CHECKING:
    from seedpack.api import compress as compress
    from seedpack.api import load as load
    from seedpack.api import plan as plan
    from seedpack.api import save as save
    from seedpack.api import unpack as unpack
    from seedpack.codecs.base import Codec as Codec
    from seedpack.codecs.registry import get_codec as get_codec
    from seedpack.codecs.registry import register_codec as register_codec
    from seedpack.converter.options import Calibration as Calibration
    from seedpack.converter.options import CompressOptions as CompressOptions
    from seedpack.converter.plan import Plan as Plan
    from seedpack.hf.config import SeedpackConfig as SeedpackConfig

_HOME = {
    "Calibration": "seedpack.converter.options",
    "Codec": "seedpack.codecs.base",
    "CompressOptions": "seedpack.converter.options",
    "Plan": "seedpack.converter.plan",
    "SeedpackConfig": "seedpack.hf.config",
    "compress": "seedpack.api",
    "get_codec": "seedpack.codecs.registry",
    "load": "seedpack.api",
    "plan": "seedpack.api",
    "register_codec": "seedpack.codecs.registry",
    "save": "seedpack.api",
    "unpack": "seedpack.api",
}
__all__ = [
    "Calibration",
    "Codec",
    "CompressOptions",
    "Plan",
    "SeedpackConfig",
    "SeedpackError",
    "__version__",
    "compress",
    "get_codec",
    "load",
    "plan",
    "register_codec",
    "save",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'seedpack' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_install()
