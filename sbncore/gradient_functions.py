"""The functions and arrays of a gradient check: the caller's own types outside, float64 of NumPy's inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbncore.arrays import borrow, give
from sbncore.interchange import detached

Array = NDArray[np.float64]
PRECISIONS = ("float64", "float32")


class Function:
    """forward as a function of all inputs to one flat array, the outputs one after another.

    Attributes:
        arrays: the inputs' values by name.
        precision: "float32" if any of them is, else "float64".
    """

    def __init__(self, forward: Callable[..., object], outputs: int | None, inputs: dict[str, Any]) -> None:
        self.forward, self.outputs, self.likes = forward, outputs, inputs
        self.arrays, self.dtypes = {}, {}
        for name, value in inputs.items():
            self.arrays[name], self.dtypes[name] = finite(name, value, PRECISIONS)
        self.precision = PRECISIONS["float32" in self.dtypes.values()]
        self.outputs_as: list[tuple[tuple[int, ...], str, Any]] = []  # shape, dtype and an array of its type

    def __call__(self, arrays: dict[str, Array]) -> tuple[Array, list[object]]:
        """Return y and a list of what forward saved, empty if it returned nothing more."""
        handed = [_handed(x, self.dtypes[name], self.likes[name]) for name, x in arrays.items()]
        result = self.forward(*handed)
        values = list(result) if isinstance(result, tuple) else [result]
        count = self.outputs or 1
        if not count <= len(values) <= count + 1:
            form = "y or (y, saved)" if count == 1 else f"{count} outputs, or those and saved"
            raise TypeError(f"forward must return {form}, got {len(values)} values; outputs says how many")
        ys, saved = values[:count], values[count:]
        if self.outputs is None and any(_looks_like_an_output(each, [*handed, *ys]) for each in saved):
            raise TypeError(
                "forward returned two float64 arrays: pass outputs=2 if both are outputs, outputs=1 if the "
                "second is what backward needs"
            )
        found = [values_of("forward's y", y, self.allowed) for y in ys]
        described = [(array.shape, dtype, like) for (array, dtype), like in zip(found, ys, strict=True)]
        self.outputs_as = self.outputs_as or described
        for (before, *_), (shape, *_) in zip(self.outputs_as, described, strict=True):
            if shape != before:
                raise ValueError(f"forward's y has shape {before}, then {shape}")
        return np.concatenate([array.ravel() for array, _ in found]), saved

    @property
    def allowed(self) -> tuple[str, ...]:
        """The dtypes of results: a lower precision than the inputs' would be a fault."""
        return PRECISIONS if self.precision == "float32" else PRECISIONS[:1]

    def split(self, flat: Array) -> list[Any]:
        """Return the parts of a flat array that belong to each output, in its shape, dtype and type."""
        sizes = [prod(shape) for shape, *_ in self.outputs_as]
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        return [
            _handed(part.reshape(shape), dtype, like)
            for part, (shape, dtype, like) in zip(parts, self.outputs_as, strict=True)
        ]


def _looks_like_an_output(value: object, others: list[object]) -> bool:
    """Whether it is an array as outputs are, and neither an input nor the output that stands before it."""
    is_array = str(getattr(value, "dtype", "")).removeprefix("torch.") in PRECISIONS
    return is_array and not any(value is other for other in others)


def inputs_of(inputs: Sequence[Any] | Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """Return the inputs by name."""
    if isinstance(inputs, Mapping):
        names, inputs = list(inputs) if names is None else names, list(inputs.values())
    if hasattr(inputs, "__dlpack__"):
        raise TypeError("inputs must be a sequence or a mapping of arrays, got one array")
    if len(inputs) == 0:
        raise ValueError("inputs is empty: nothing to check")
    labels = names or [f"inputs[{i}]" for i in range(len(inputs))]
    if not len(labels) == len(set(labels)) == len(inputs):
        raise ValueError(f"{len(inputs)} inputs need a name each, got {labels}")
    return dict(zip(labels, inputs, strict=True))


def gradients_of(result: object, function: Function) -> dict[str, Array]:
    """Return by name the values of the gradients that are not None."""
    arrays, allowed = function.arrays, function.allowed
    values: list[object] = [result]
    if isinstance(result, Mapping):
        values = [result[name] for name in arrays if name in result]
    elif type(result) not in (list, tuple) and all(hasattr(result, name) for name in arrays):
        values = [getattr(result, name) for name in arrays]
    elif isinstance(result, (list, tuple)):
        values = [*result]
    if len(values) != len(arrays):
        came = f"{len(values)} (in {type(result).__name__})"
        came += f", under the names {[*result]}" if isinstance(result, Mapping) else ""
        raise ValueError(f"backward must return a gradient for each of {[*arrays]}, got {came}")
    pairs = zip(arrays, values, strict=True)
    grads = {name: finite(f"the gradient of {name}", g, allowed)[0] for name, g in pairs if g is not None}
    for name, grad in grads.items():
        if grad.shape != (shape := arrays[name].shape):
            raise ValueError(f"the gradient of {name} has shape {grad.shape}, {name} has {shape}")
    if not grads:
        raise ValueError("backward returned None for every input: nothing to check")
    return grads


def values_of(what: str, value: object, allowed: tuple[str, ...]) -> tuple[Array, str]:
    """Return an array's values, a copy since the caller may use the buffer again, and its dtype.

    Raises:
        TypeError: for another dtype, or an array that is not on the CPU.
    """
    array: Any = value
    if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__"):
        try:
            array = borrow(detached(value), what)
        except TypeError as complaint:
            raise TypeError(f"{what} must be a {' or '.join(allowed)} array: {complaint}") from None
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{what} must be on the CPU, got an array on a GPU")
    array = np.array(array, order="K")
    if array.dtype.name not in allowed:
        came = f"{array.dtype} ({type(value).__name__})"
        raise TypeError(f"{what} must be a {' or '.join(allowed)} array, got {came}")
    return array.astype(np.float64, order="K", copy=False), array.dtype.name


def finite(what: str, value: object, allowed: tuple[str, ...]) -> tuple[Array, str]:
    """As `values_of`, which are to be there and finite."""
    array, dtype = values_of(what, value, allowed)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{what} is empty or not finite everywhere")
    return array, dtype


def _handed(values: Array, dtype: str, like: Any) -> Any:
    """Return values as an array of the caller's type, memory of its own."""
    array = values.astype(dtype, order="K")
    return give(array, like) if hasattr(like, "__dlpack__") and not isinstance(like, np.generic) else array
