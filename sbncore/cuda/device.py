"""A CUDA device through CuPy: memory, and kernels of sbn.cu compiled when first launched."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from sbncore.cuda import driver
from sbncore.cuda.driver import Launch

FILES = ("device.cu", "places.cu", "channels.cu", "passes.cu", "sbn.cu")
OPTIONS = ("--std=c++17",)
INSTALL = "pip install 'sbncore[cuda13]' (or [cuda12], by what the driver supports: nvidia-smi shows it)"


@cache
def source() -> str:
    """Return the kernels' source: one text, so that no compiler needs a path, and no cache a stale header."""
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in FILES)


@cache
def cupy() -> ModuleType:
    """Import CuPy.

    Raises:
        RuntimeError: if it is missing, or finds no driver or no device.
    """
    try:
        import cupy
    except ImportError as complaint:
        raise RuntimeError(f"arrays on a GPU need CuPy ({complaint}): {INSTALL}") from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as complaint:
        raise RuntimeError(f"CuPy finds no usable NVIDIA driver or GPU: {complaint}") from None
    if not count:
        raise RuntimeError("CuPy finds an NVIDIA driver but no GPU; is CUDA_VISIBLE_DEVICES empty?")
    return cupy  # type: ignore[no-any-return]


class Device:
    """One GPU. Launches go to the caller's current stream there, asked for each time."""

    def __init__(self, index: int) -> None:
        self._cupy = cupy()
        self._device = self._cupy.cuda.Device(index)
        self.multiprocessors: int = self._device.attributes["MultiProcessorCount"]
        new_enough = self._cupy.cuda.runtime.driverGetVersion() >= 12030
        self._overlap = new_enough and int(self._device.compute_capability) >= 90
        self._kernels: dict[str, Any] = {}
        self._functions: list[Any] = []
        self._threads = threading.local()

    def step(self, array: Any) -> Any:
        """Return a view of a plan's step.

        Raises:
            TypeError: if it is not in this device's memory.
        """
        if not isinstance(array, self._cupy.ndarray):
            try:
                array = self._cupy.from_dlpack(array)
            except Exception as complaint:
                raise TypeError(f"step: expected an array on {self._device}, got: {complaint}") from None
        if array.device != self._device:
            raise TypeError(f"step: expected an array on {self._device}, got one on {array.device}")
        return array

    def launch(self, launches: Iterable[Launch], record: bytes, stream: int | None = None) -> None:
        """Launch kernels one after the other, with the bytes of their one argument.

        On CuPy's current stream, unless another is given.
        """
        with self._device:
            if not hasattr(self._threads, "has_context"):
                self._cupy.cuda.runtime.free(0)  # makes the context current, as the driver asks
                self._threads.has_context = True
            if stream is None:
                stream = self._cupy.cuda.get_current_stream().ptr
            launch = driver.launcher(record, stream, self._overlap)
            for name, grid, threads in launches:
                launch(self._kernels.get(name) or self._compiled(name), grid, threads)

    def compile(self, names: Iterable[str]) -> None:
        """Compile kernels, which CuPy keeps on disk, before they are launched."""
        with self._device:
            for name in names:
                self._compiled(name)

    def _compiled(self, name: str) -> Any:
        """Compile a kernel and return the driver's handle of it."""
        module = self._cupy.RawModule(code=source(), options=OPTIONS, name_expressions=(name,))
        try:
            function = module.get_function(name)  # which its module lives as long as
            self._functions.append(function)
            self._kernels[name] = function.kernel.ptr
            return function.kernel.ptr
        except Exception as complaint:
            if "nvrtc" not in f"{type(complaint)} {complaint}".lower():
                raise
            raise RuntimeError(
                f"CuPy's compiler NVRTC fails: {complaint}; if it is missing, {INSTALL}"
            ) from complaint


@cache
def device_at(index: int) -> Device:
    """Return the device of an index."""
    return Device(index)
