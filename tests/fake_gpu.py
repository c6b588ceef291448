"""A device that every machine has: tensors stay in main memory, and operations that mix devices fail as on a GPU.

Inside `fake_gpu()` a network moved `.to("cuda")` says that it is on a GPU, and so does what is computed from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread, local
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
_ANY_DEVICE = {
    "torch.Tensor.copy_", "torch.Tensor.__getitem__", "torch.Tensor.data.__set__", "torch.Tensor.grad.__set__",
    "torch.is_tensor", "torch.Tensor.is_set_to", "torch.Tensor.type_as", "torch.Tensor.to",
    "_has_compatible_shallow_copy_type",
}  # fmt: skip
_TOGETHER = {"torch.stack", "torch.cat", "torch.concat", "torch.hstack", "torch.vstack"}
"""Of other functions a number may lie in main memory."""


def is_on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.__dict__.get("_is_on_gpu", False)


class _FakeGpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(is_on_gpu(value) for value in given)
        if there and func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        moved, args, kwargs = _moved(func, args, kwargs)
        sized = {is_on_gpu(value) for value in given if value.dim()}
        free = name in _ANY_DEVICE or name.endswith(("__setitem__", "__setstate__"))
        places = {is_on_gpu(value) for value in given} if name in _TOGETHER else sized
        if not free and (len(places) > 1 or (there and sized == {False} and not name.endswith("__getitem__"))):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two: {name}")
        if there and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if name.endswith("__getitem__") and there and not is_on_gpu(args[0]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if name.endswith("__setitem__") and len(sized) > 1:
            _check_assignment(args[0], args[1], args[2])
        found = _inside_torch(func, args, kwargs)
        if func == Tensor.data.__set__:  # pyright: ignore
            args[0]._is_on_gpu = is_on_gpu(args[1])
        leaves = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        if moved is not None:
            if given and moved != is_on_gpu(given[0]):  # another device is other memory
                found = found.clone()
                leaves = [found]
            there = moved
        elif name.endswith("__getitem__"):
            there = is_on_gpu(args[0])
        elif sized and name != "torch.Tensor.copy_":
            there = sized == {True}
        for leaf in leaves:
            if not any(leaf is value for value in given) or moved is not None:
                setattr(leaf, "_is_on_gpu", there)  # noqa: B010  no attribute that torch declares
        return found


class _User(local):
    """asks: does this thread run anything but torch's own functions, which must find tensors where they are?"""

    asks = True


_user = _User()


def _inside_torch(func: Any, args: Any, kwargs: Any) -> Any:
    before, _user.asks = _user.asks, False
    try:
        return func(*args, **kwargs)
    finally:
        _user.asks = before


def _moved(func: Any, args: Any, kwargs: Any) -> tuple[bool | None, Any, Any]:
    """(whether the result lies there, or None if that follows from the arguments; arguments without the device)"""
    if func is Tensor.cpu:
        return False, args, kwargs
    if func is Tensor.cuda:
        return True, args[:1], {}
    if kwargs.get("generator") is not None and torch.device(kwargs.get("device") or "cpu").type == "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if func is Tensor.to or kwargs.get("device") is not None:
        places = [value for value in (*args[1:], *kwargs.values()) if _is_device(value)]
        places = [torch.device(value).type == "cuda" for value in places]
        places += [is_on_gpu(value) for value in args[1:] if isinstance(value, Tensor) and func is Tensor.to]
        args = (*args[:1], *(torch.device("cpu") if _is_device(value) else value for value in args[1:]))
        kwargs = {key: torch.device("cpu") if _is_device(value) else value for key, value in kwargs.items()}
        return (places[0] if places else None), args, kwargs
    return None, args, kwargs


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda"))


def _check_assignment(target: Tensor, index: Any, value: Any) -> None:
    by_number = any(isinstance(leaf, Tensor) for leaf in tree_leaves(index))  # slices are copied to, from anywhere
    if by_number and isinstance(value, Tensor) and value.dim() and is_on_gpu(value) != is_on_gpu(target):
        raise RuntimeError("Expected all tensors to be on the same device: assignment")
    if not is_on_gpu(target) and any(is_on_gpu(leaf) for leaf in tree_leaves(index)):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Torch has a GPU in here, of sorts."""
    make = nn.Parameter.__new__

    def parameter(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        made = make(cls, data, requires_grad)
        made._is_on_gpu = is_on_gpu(data)
        return made

    def run(thread: Any) -> None:  # modes are each thread's own
        with _FakeGpu():
            in_thread(thread)

    in_thread = Thread.run
    own = torch._C.TensorBase.device
    with (
        mock.patch.object(nn.Parameter, "__new__", parameter),
        mock.patch.object(Thread, "run", run),
        mock.patch.object(
            Tensor, "device", property(lambda self: GPU if is_on_gpu(self) and _user.asks else own.__get__(self))
        ),
        mock.patch.object(Tensor, "is_cuda", property(is_on_gpu)),
        _FakeGpu(),
    ):
        yield
