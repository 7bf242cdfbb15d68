"""Arrays of frameworks that nobody here has: NumPy's memory behind DLPack, and as much else as each has."""

import numpy as np


class Array:
    """An array of a framework without ``from_dlpack``, which exports by DLPack 1.0."""

    def __init__(self, array):
        self.array = array

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        return self.array.__dlpack__(max_version=max_version, copy=copy)


class Older(Array):
    """It exports by DLPack before 1.0."""

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__()


class Copying(Array):
    """It exports copies, whatever one asks for, and says so."""

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        return self.array.__dlpack__(max_version=max_version, copy=True)


class Unwilling(Array):
    """It exports copies only, and refuses where none is wanted."""

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if copy is False:
            raise BufferError("the memory is elsewhere")
        return self.array.__dlpack__(max_version=max_version, copy=True)


def of(framework, *bases):
    """Return a class of arrays that another framework calls its own."""
    return type("Array", bases or (Array,), {"__module__": f"{framework}.core"})


class Deviceless:
    """It has ``__dlpack__`` and not the rest."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)


class Deleted(Array):
    """Its memory is gone, and every question about it an error of the framework's own kind."""

    def __dlpack_device__(self):
        raise LookupError("Array has been deleted")


class Typeless(Array):
    """It exports by DLPack, and has no dtype to ask for, as pyarrow's."""

    @property
    def dtype(self):
        raise AttributeError("dtype")


class Tracer:
    """A stand-in for values that a compiler traces: it has a shape, a type and half a protocol."""

    def __init__(self, array):
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack__(self, **options):
        raise AssertionError("nobody should ask a tracer for memory")

    def __getattr__(self, name):
        raise AttributeError(f"Tracer has no attribute {name}")


def read_only(array):
    """Return a copy that must not be written."""
    array = np.array(array)
    array.flags.writeable = False
    return array
