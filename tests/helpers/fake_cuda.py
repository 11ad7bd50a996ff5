"""Tensors that say they are on a GPU and live on the CPU: they find what is made on, or mixed with, the wrong device.

Inside `FakeCuda()` whatever is made on or moved to "cuda" is such a tensor. A function of tensors of both devices fails as
on a GPU; Triton's interpreter runs kernels on them.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from seedpack.kernels.common import gpu_configs as configs

CUDA = torch.device("cuda", 0)
DEVICE, IS_CUDA, IS_CPU = (vars(torch._C.TensorBase)[name].__get__ for name in ("device", "is_cuda", "is_cpu"))
MAY_MIX = ("to", "copy_", "__getitem__", "__setitem__", "type_as")


class CudaTensor(torch.Tensor):
    """Holds a tensor on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> CudaTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CUDA
        )
        made.held = held
        return made

    def __init__(self, held: torch.Tensor) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func}: outside FakeCuda()")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({self.held})"


class FakeCuda(TorchFunctionMode):
    """The GPU, as a context: one core, in which no assembly runs."""

    def __enter__(self) -> Any:
        self.patches = ExitStack()
        properties = SimpleNamespace(multi_processor_count=1, gcnArchName="none")
        self.patches.enter_context(mock.patch("torch.cuda.get_device_properties", return_value=properties))
        self.patches.enter_context(mock.patch("torch.cuda.device_count", return_value=1))
        self.patches.enter_context(mock.patch("torch.cuda.mem_get_info", return_value=(1 << 30, 1 << 30)))
        self.patches.enter_context(mock.patch("seedpack.kernels.common.gpu_configs.is_nvidia", return_value=False))
        self.patches.enter_context(
            mock.patch("seedpack.kernels.common.gpu_configs.current", return_value=nullcontext())
        )
        tuned = {"none": {kernel: candidates[0] for kernel, candidates in configs.CANDIDATES.items()}}
        self.patches.enter_context(mock.patch.dict(configs.TUNED, tuned))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = tree_flatten((args, kwargs))[0]
        ours = [value for value in values if isinstance(value, CudaTensor)]
        others = [value for value in values if isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor)]
        name = getattr(func, "__name__", "")
        if name == "__get__" and ours and func in (DEVICE, IS_CUDA, IS_CPU):
            return CUDA if func == DEVICE else func == IS_CUDA
        if ours and name not in MAY_MIX and any(other.dim() for other in others):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        wanted = [torch.device(value).type for value in values if _names_device(value)]
        args, kwargs = tree_map(_held, (args, kwargs))
        with torch._C.DisableTorchFunction():
            result = func(*args, **kwargs)
        there = wanted[0] == "cuda" if wanted else bool(ours) and name != "cpu"
        back = {id(value.held): value for value in ours}
        return tree_map(lambda value: _wrapped(value, back), result) if there else result


def _names_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda"))


def _held(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return value.held
    return torch.device("cpu") if _names_device(value) else value


def _wrapped(value: Any, back: dict[int, CudaTensor]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return back[id(value)] if id(value) in back else CudaTensor(value)
