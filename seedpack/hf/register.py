"""Make transformers know the quantisation method `seedpack`, without importing transformers or torch.

Where transformers is loaded already, its registries get two lazy entries at once; otherwise an import hook adds
them when its registry of quantisers is loaded. `seedpack.hf` is imported when a packed model is.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from seedpack.converter.sources.registry import register_source
from seedpack.hf.internals import QUANTIZERS_MODULE, register_quantizer

METHOD = "seedpack"
SOURCES = {
    "folder": "seedpack.hf.folder:FolderSource",
    ".gguf": "seedpack.hf.gguf:open_gguf",
    "pretrained": "seedpack.hf.pretrained:open_live",
    "remote": "seedpack.hf.remote:open_remote",
    "hub": "seedpack.hf.hub:download",
}


class _Lazy:
    """Stands for a class of `seedpack.hf` until it is called or one of its attributes is asked for."""

    def __init__(self, module: str, name: str):
        self._module, self._name = module, name

    def _load(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._load(), attribute)


def _register(auto: ModuleType) -> None:
    quantizer, config = (
        _Lazy("seedpack.hf.quantizer", "SeedpackQuantizer"),
        _Lazy("seedpack.hf.config", "SeedpackConfig"),
    )
    register_quantizer(auto, METHOD, quantizer, config)


class _Loader(importlib.abc.Loader):
    """Runs the real loader, then registers."""

    def __init__(self, inner: importlib.abc.Loader):
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _register(module)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._inner, attribute)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != QUANTIZERS_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Register now, or as soon as transformers is imported; and the sources of this room. Doing it twice does no harm."""
    for kind, opener in SOURCES.items():
        register_source(kind, opener)
    if QUANTIZERS_MODULE in sys.modules:
        _register(sys.modules[QUANTIZERS_MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
