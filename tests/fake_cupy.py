"""As much of CuPy as sbncore touches, over NumPy memory and the emulator: the launch path without a GPU."""

import types

import emulation
import numpy as np


class FakeArray:
    """A CuPy array to the code under test: no NumPy array, and what it does not know fails."""

    def __init__(self, memory):
        self.memory = memory

    device = property(lambda self: DEVICE)
    data = property(lambda self: types.SimpleNamespace(ptr=self.memory.__array_interface__["data"][0]))
    flags = property(lambda self: types.SimpleNamespace(c_contiguous=self.memory.flags.c_contiguous))

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **options):
        raise AssertionError("an array of CuPy's own needs no exchange")

    def __array__(self, *args, **options):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __setitem__(self, index, value):
        self.memory[index] = value.memory if isinstance(value, FakeArray) else value

    def __iadd__(self, value):
        self.memory += value
        return self

    def get(self):
        return self.memory.copy()


def _method(name):
    def method(self, *args, **options):
        return FakeArray(np.asarray(getattr(self.memory, name)(*args, **options)))

    return method


for _name in ("reshape", "transpose", "view", "copy", "astype", "item", "__getitem__"):
    setattr(FakeArray, _name, _method(_name))
for _name in ("add", "sub", "mul", "pow", "lshift"):
    for _each in (f"__{_name}__", f"__r{_name}__"):
        def _operator(self, other, _each=_each):
            return FakeArray(getattr(self.memory, _each)(getattr(other, "memory", other)))

        setattr(FakeArray, _each, _operator)
for _name in ("shape", "dtype", "ndim", "size", "strides", "itemsize", "nbytes"):
    setattr(FakeArray, _name, property(lambda self, name=_name: getattr(self.memory, name)))


class _Device:
    id = 0
    compute_capability = "90"
    attributes = {"MultiProcessorCount": 3}  # noqa: RUF012
    entered = 0

    def __enter__(self):
        self.entered += 1

    def __exit__(self, *exception):
        self.entered -= 1

    def __str__(self):
        return "<CUDA Device 0>"


DEVICE = _Device()


class _RawModule:
    """Launches on the emulator, by the bytes of the struct."""

    def __init__(self, *, code, options, name_expressions):
        assert "__global__" in code and options == ("--std=c++17",)
        (self.name,) = name_expressions

    def get_function(self, name):
        assert name == self.name

        return types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=name))


def launch(function, grid, threads, stream, argument, overlap):
    """`sbncore.cuda.driver.launch`, on the emulator."""
    assert DEVICE.entered and overlap and stream == STREAM
    EMULATOR.launch([(function, grid, threads)], argument)


EMULATOR = None
STREAM = 7


def module(kinds):
    """Return a module to stand in for `cupy`, with an emulator for these element types."""
    global EMULATOR
    EMULATOR = emulation.EmulatedDevice([emulation.build((kind,)) for kind in kinds])

    def make(function):
        def made(*args, **options):
            assert DEVICE.entered or function is not np.empty
            array = function(*args, **options)
            EMULATOR.name(array, written=function is not np.empty)
            return FakeArray(array)

        return made

    fake = types.ModuleType("cupy")
    fake.ndarray, fake.RawModule = FakeArray, _RawModule
    for function in (np.empty, np.zeros, np.ones, np.array):
        setattr(fake, function.__name__, make(function))
    fake.cuda = types.SimpleNamespace(
        Device=lambda index: DEVICE,
        get_current_stream=lambda: types.SimpleNamespace(ptr=STREAM),
        runtime=types.SimpleNamespace(
            getDeviceCount=lambda: 1, CUDARuntimeError=RuntimeError, driverGetVersion=lambda: 13000,
            free=lambda address: None,
        ),
    )
    return fake
