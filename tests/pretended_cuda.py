"""A pretended CUDA device: tensors that say `cuda:0`, are computed on the CPU, and do not mix.

Real GPUs refuse an operation on tensors of two devices, and `.numpy()`; a CPU never shows where a
stage forgot to move something. Inside `pretended_cuda()` such a mistake raises as it would there.
What it cannot show: kernels' numbers, speed, memory, and what a C++ operation makes by itself on
the wrong device.

How: a wrapper subclass holds the CPU tensor. A function mode gives devices their pretended names
(factories, `.to`, `.cpu`), and a dispatch mode unwraps, checks, computes and wraps again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_CUDA = torch.device("cuda", 0)


class CudaTensor(Tensor):
    """Looks like a tensor on `cuda:0`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device="cpu",
        )  # fmt: skip
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        return _CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def storage(self) -> Any:
        return self.inner.storage()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True  # what nn.Parameter marks tensors of other classes with
        memo[id(self)] = copied
        return copied

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Threads that autograd starts have no modes of their own.
        return _compute(func, args, kwargs or {}, factory_here=False)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


_MAY_MIX = ("copy_", "_to_copy", "index.Tensor", "index_put", "_index_put_impl_", "set_")


def _compute(func: Any, args: Any, kwargs: dict[str, Any], *, factory_here: bool) -> Any:
    tensors = [x for x in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(x, Tensor)]
    there = any(isinstance(x, CudaTensor) for x in tensors)
    name = func.__name__
    wanted = kwargs.get("device")
    if there and not name.startswith(_MAY_MIX):
        # A number on the CPU may meet tensors anywhere, as on a real device.
        strangers = [x for x in tensors if not isinstance(x, CudaTensor) and x.dim()]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {name} was given "
                f"{[(str(x.device), tuple(x.shape)) for x in tensors]}"
            )
    if _is_cuda(wanted):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = pytree.tree_map_only(CudaTensor, lambda x: x.inner, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    # `_to_copy` of a pretended tensor to `cpu` is autograd asking the true device: moves that the
    # code asks for have been answered by `_moved`.
    if not (there or _is_cuda(wanted) or (factory_here and not tensors)):
        return out
    known = {id(x.inner): x for x in tensors if isinstance(x, CudaTensor)}

    def pretended(x: Tensor) -> Tensor:
        if isinstance(x, CudaTensor):
            return x
        return known[id(x)] if id(x) in known else CudaTensor(x)

    return pytree.tree_map_only(Tensor, pretended, out)


class _Dispatch(TorchDispatchMode):
    def __init__(self, names: _Names) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {}, factory_here=self.names.depth > 0)


class _Names(TorchFunctionMode):
    """Answers what C++ would answer from the true device."""

    depth = 0
    """How many calls with pretended tensors are open: what they make is pretended as well."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda) and isinstance(first, Tensor):
            return _moved(func, first, args[1:], kwargs)
        if isinstance(first, CudaTensor):
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy.")
            if func is Tensor.tolist:
                return first.detach().inner.tolist()
            if func is Tensor.new_tensor:
                kwargs = {"dtype": first.dtype, **kwargs, "device": _CUDA}
                func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor) and _is_cuda(kwargs.get("device")):
            return CudaTensor(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        leaves = pytree.arg_tree_leaves(*args, **kwargs)
        here = any(isinstance(x, CudaTensor) for x in leaves)
        self.depth += here
        try:
            return func(*args, **kwargs)
        finally:
            self.depth -= here


def _moved(func: Any, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`to`, `cpu` and `cuda`."""
    device, dtype, copy = None, kwargs.get("dtype"), bool(kwargs.get("copy", False))
    if func is Tensor.to:
        device = kwargs.get("device")
        for arg in (*args, kwargs.get("other")):
            if isinstance(arg, Tensor):
                device, dtype = arg.device, arg.dtype
            elif isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, (str, torch.device)):
                device = torch.device(arg)
    else:
        device = torch.device("cuda" if func is Tensor.cuda else "cpu")
    here = isinstance(tensor, CudaTensor)
    goes = device is not None and _is_cuda(device) != here
    dtype = dtype or tensor.dtype
    if not goes:
        if dtype == tensor.dtype and not copy:
            return tensor
        return torch.ops.aten._to_copy(tensor, dtype=dtype)
    return _Move.apply(tensor, torch.device(device), dtype)


class _Move(torch.autograd.Function):
    """A copy on the other device; its gradient moves back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        ctx.was = tensor.device, tensor.dtype
        return _placed(tensor, device, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _placed(grad, *ctx.was), None, None


def _placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    source = tensor.inner if isinstance(tensor, CudaTensor) else tensor
    moved = torch.empty_like(source, dtype=dtype).copy_(source)
    return CudaTensor(moved) if _is_cuda(device) else moved


@contextlib.contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    """One device `cuda:0` for the length of the block."""
    properties = mock.Mock(total_memory=8 << 30, multi_processor_count=1, major=9, minor=0)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
        "synchronize": None, "empty_cache": None, "max_memory_allocated": 1 << 20,
        "reset_peak_memory_stats": None, "get_device_name": "pretended", "is_bf16_supported": True,
        "get_device_capability": (9, 0), "get_device_properties": properties,
        "manual_seed_all": None, "manual_seed": None, "is_initialized": True,
        "get_rng_state": torch.zeros(8, dtype=torch.uint8), "set_rng_state": None,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        # A plain parameter cannot become a pretended one in place.
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        names = _Names()
        stack.enter_context(names)
        stack.enter_context(_Dispatch(names))
        yield _CUDA
