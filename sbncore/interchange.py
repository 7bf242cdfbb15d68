"""Arrays of other frameworks: whether they may be exported and written, and which way leads back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

IMMUTABLE = "jax", "jaxlib", "tensorflow"  # frameworks whose arrays never change, whatever their capsules say
PROTOCOL = "__dlpack__", "__dlpack_device__"

_ways: dict[tuple[type, np.dtype], Callable[[Any], Any]] = {}


def exportable(array: Any, name: str, written: bool) -> Any:
    """Return the caller's array as DLPack can export it: of a tensor, without what DLPack does not carry.

    Raises:
        TypeError: if it is no array with memory, or a tensor that autograd follows.
        ValueError: if it is to be written, and never is.
    """
    missing = [part for part in PROTOCOL if not hasattr(array, part)]
    if missing:
        came = type(array).__name__
        if missing[0] != PROTOCOL[0]:
            came += f" without {missing[0]}: pass numpy.asarray({name}), outside of any tracing"
        raise TypeError(f"{name}: expected an array (NumPy's or one with DLPack), got {came}")
    if written and _framework(array) in IMMUTABLE:
        raise ValueError(f"{name}: expected a writeable array, got a read-only one, {_framework(array)}'s")
    torch = sys.modules.get("torch")
    if isinstance(array, getattr(torch, "Tensor", ())):
        return _tensor(torch, array, name, written)
    return array


def _tensor(torch: Any, tensor: Any, name: str, written: bool) -> Any:
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{name}: expected a tensor with memory of its own, got {type(tensor).__name__}")
    forward = torch.autograd.forward_ad
    followed = forward._current_level >= 0 and forward.unpack_dual(tensor).tangent is not None
    if followed or torch._C._is_tracing():
        raise TypeError(
            f"{name}: expected a tensor that neither forward mode nor torch.jit.trace follows: they do not "
            "see through sbncore's functions"
        )
    if tensor.requires_grad:
        if torch.is_grad_enabled():
            raise TypeError(
                f"{name}: expected a tensor that requires no gradient, since autograd does not see through "
                f"sbncore's functions: use a layer of sbncore.adapters.torch, or pass {name}.detach()"
            )
        tensor = tensor.detach()
    if tensor.is_neg() or tensor.is_conj():
        if written:
            raise ValueError(f"{name}: expected memory as it is read, got a negative or conjugate view")
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor


def way_back(like: Any, storage: np.dtype) -> Callable[[Any], Any]:
    """Return what makes an array of the type of ``like`` of NumPy's or CuPy's in a storage type.

    By the ``from_dlpack`` of the type's module, which is tried once; a type without one gets NumPy's arrays.
    """
    key = type(like), storage
    if key not in _ways:
        _ways[key] = _found(like, storage)
    return _ways[key]


def _found(like: Any, storage: np.dtype) -> Callable[[Any], Any]:
    xp, dtype = namespace(like), like.dtype
    numpys = isinstance(dtype, np.dtype)
    element = {"i2": np.dtype("f2"), "u2": dtype if numpys else storage}.get(storage.str[1:], storage)

    def back(result: Any) -> Any:
        if storage != np.uint16:
            return xp.from_dlpack(result.view(element))
        if numpys:
            return xp.asarray(result.view(element))
        return xp.from_dlpack(result).view(dtype)

    try:
        back(np.zeros(1, storage))
    except Exception:  # whatever it is that the framework lacks
        return lambda result: result.view(element)
    return back


def detached(array: Any) -> Any:
    """Return an array without the history that PyTorch keeps of it."""
    return array.detach() if hasattr(array, "detach") else array


def namespace(array: Any) -> Any:
    """Return the module of an array's functions, or None."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules.get(_framework(array))


def _framework(array: Any) -> str:
    return type(array).__module__.partition(".")[0]
