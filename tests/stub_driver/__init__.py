"""A CUDA driver for the real CuPy where there is none: memory, streams, graphs and devices, in this process.

CuPy's modules find the CUDA runtime and driver in `__pyx_capi__` of two of them. `load` puts Python functions
there before anything has imported CuPy; what is not replaced still ends in CuPy's error for a missing driver.
NVRTC, RawModule, the cache of kernels, the memory pool, streams and arrays are CuPy's own.

Kernels of sbncore run in the emulator (`emulation`), CuPy's elementwise kernels as host code (`elementwise`).
All work is done when it is enqueued, or, of a stream that captures, when its graph is launched.
"""

import ctypes
import gc
import importlib.util
import os
import struct
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import emulation
import numpy as np
import pytest

from sbncore import arguments, call
from sbncore.cuda import device, driver, record

from . import elementwise

DEVICES, MULTIPROCESSORS, VERSION = 2, 3, 13020
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS = 75, 76, 16  # cudaDeviceAttr
_NO_CONTEXT, _INVALID_HANDLE = 201, 400  # CUresult
_ON_DEVICE = 2  # cudaMemoryTypeDevice
_LAUNCH = struct.Struct("<7I4xQQI4x")  # CUlaunchConfig


class Malloc(NamedTuple):
    """What cudaMalloc has handed out."""

    device: int
    address: int
    size: int


class Launch(NamedTuple):
    """A kernel that was launched, or captured."""

    kernel: str
    device: int
    stream: int
    captured: bool


class Function(NamedTuple):
    """A kernel of a module, which is loaded on one device."""

    name: str
    image: bytes
    device: int


class Driver:
    """The runtime's and the driver's functions, by their names in CuPy, and a record of what was asked.

    ``kernels`` are the names of sbncore's kernels, by their functions. ``errors`` are those that CuPy could
    not be told of: a test must end with none.
    """

    def __init__(self):
        self.mallocs, self.launches, self.errors, self.kernels = [], [], [], {}
        self.emulators, self.waits, self._events = [], [], {}
        self._threads = threading.local()
        self._owners = {}  # device of each address
        self._memory, self._pinned, self._streams, self._capturing, self._graphs = {}, {}, {}, {}, {}
        self._modules, self._functions, self._handles = {}, {}, iter(range(0x1000, sys.maxsize, 16))

    def begin(self, emulators):
        """Forget what was recorded; kernels run on these emulators, one for each device."""
        self.mallocs, self.launches, self.errors, self.emulators = [], [], [], emulators
        self.waits = []
        self._threads = threading.local()

    # devices

    def getDeviceCount(self):
        return DEVICES

    def getDevice(self):
        return getattr(self._threads, "device", 0)

    def setDevice(self, device):
        self._threads.device = device

    def runtimeGetVersion(self):
        return VERSION

    driverGetVersion = runtimeGetVersion

    def deviceGetAttribute(self, attribute, device):
        known = {_CAPABILITY_MAJOR: 9, _CAPABILITY_MINOR: 0, _MULTIPROCESSORS: MULTIPROCESSORS}
        return known.get(attribute, 1)

    def deviceCanAccessPeer(self, device, peer):
        return 0

    def _ensure_context(self):
        self._has_context()

    def _has_context(self):
        """Every call of the runtime's that needs one makes the context of the current device."""
        self._threads.__dict__.setdefault("contexts", set()).add(self.getDevice())

    # memory

    def malloc(self, size):
        self._has_context()
        address = _allocate(self._memory, size)
        self._owners[address] = self.getDevice()
        self.mallocs.append(Malloc(self.getDevice(), address, size))
        return address

    def free(self, address):
        self._has_context()
        self._memory.pop(address, None)

    def hostAlloc(self, size, flags):
        return _allocate(self._pinned, size)

    def freeHost(self, address):
        self._pinned.pop(address, None)

    def memGetInfo(self):
        return 1 << 33, 1 << 33

    def pointerGetMemoryType(self, address):
        return _ON_DEVICE if self.owner(address) is not None else 0

    def pointerGetAttributes(self, address):
        import cupy

        attributes = cupy.cuda.runtime.PointerAttributes
        return attributes(self.owner(address), address, 0, _ON_DEVICE)

    def owner(self, address):
        """Return the device that an address was allocated on; the pools that CuPy keeps do not tell."""
        for begin, memory in self._memory.items():
            if begin <= address < begin + memory.nbytes:
                return self._owners[begin]
        return None

    def memcpy(self, to, origin, size, kind):
        self._has_context()
        ctypes.memmove(to, origin, size)
        self._written(to, size)

    def memcpyAsync(self, to, origin, size, kind, stream):
        self._enqueue(stream, lambda: self.memcpy(to, origin, size, kind))

    def memset(self, to, value, size):
        self._has_context()
        ctypes.memset(to, value, size)
        self._written(to, size)

    def memsetAsync(self, to, value, size, stream):
        self._enqueue(stream, lambda: self.memset(to, value, size))

    def _written(self, begin, size):
        for emulator in self.emulators:
            emulator.mark(begin, size)

    # streams, events and graphs

    def streamCreate(self):
        stream = next(self._handles)
        self._streams[stream] = self.getDevice()
        return stream

    def streamCreateWithFlags(self, flags):
        return self.streamCreate()

    def streamCreateWithPriority(self, flags, priority):
        return self.streamCreate()

    def streamDestroy(self, stream):
        del self._streams[stream]

    def streamSynchronize(self, stream):
        assert stream not in self._capturing, "a stream that captures was waited for"

    def deviceSynchronize(self):
        assert not self._capturing, "a device was waited for while a stream captures"

    def streamIsCapturing(self, stream):
        return int(stream in self._capturing)

    def streamBeginCapture(self, stream, mode=None):
        self._capturing[stream] = []

    def streamEndCapture(self, stream):
        graph = next(self._handles)
        self._graphs[graph] = self._capturing.pop(stream)
        return graph

    def graphInstantiate(self, graph):
        return graph

    def graphUpload(self, graph, stream):
        pass

    def graphDestroy(self, graph):
        pass

    graphExecDestroy = graphDestroy

    def graphLaunch(self, graph, stream):
        for work in self._graphs[graph]:
            work()

    def eventCreateWithFlags(self, flags):
        return next(self._handles)

    def eventDestroy(self, event):
        pass

    def eventRecord(self, event, stream):
        self._events[event] = stream

    def eventSynchronize(self, event):
        pass

    def streamWaitEvent(self, stream, event, flags=0):
        self.waits.append((stream, self._events[event]))

    def _enqueue(self, stream, work):
        if stream in self._capturing:
            self._capturing[stream].append(work)
        else:
            work()

    # kernels

    def moduleLoadData(self, image):
        module = next(self._handles)
        self._modules[module] = bytes(image), self.getDevice()
        return module

    def moduleUnload(self, module):
        del self._modules[module]

    def moduleGetFunction(self, module, name):
        function = next(self._handles)
        self._functions[function] = Function(name, *self._modules[module])
        return function

    def funcGetAttribute(self, attribute, function):
        return 1024

    def funcSetAttribute(self, function, attribute, value):
        pass

    def launchKernel(self, function, *sizes_stream_arguments):
        """Launch a kernel of CuPy's own."""
        *_, stream, arguments, _ = sizes_stream_arguments
        name, image, device = self._functions[function]
        assert device == self.getDevice(), f"{name} was loaded on device {device}"
        kernel = elementwise.Kernel(image.decode())
        values = kernel.copied(arguments)
        self.launches.append(Launch(name, device, stream, stream in self._capturing))
        self._enqueue(stream, lambda: kernel.run(values, self._written))

    def cuLaunchKernelEx(self, config, function, arguments, extra):
        """Launch a kernel of sbncore's: the driver's function, which CuPy does not call."""
        *grid, threads, _, _, _, stream, attributes, count = _LAUNCH.unpack(config)
        device = self.getDevice()
        if device not in getattr(self._threads, "contexts", ()):
            return _NO_CONTEXT
        if self._functions[function].device != device or self._streams.get(stream, device) != device:
            return _INVALID_HANDLE
        kind, _, overlaps = struct.unpack("<3i", ctypes.string_at(attributes, 12))
        assert (count, kind, overlaps) == (1, 6, 1)  # programmatic stream serialization
        name = self.kernels[function]
        filled = ctypes.string_at(ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0], record.SIZE)
        self.launches.append(Launch(name, device, stream, stream in self._capturing))
        launches = [(name, tuple(grid[:2]), threads)]
        self._enqueue(stream, lambda: self.emulators[device].launch(launches, filled))
        return 0

    def cuGetErrorString(self, code, text):
        text._obj.value = {_NO_CONTEXT: b"no context", _INVALID_HANDLE: b"of another device"}[code]


DRIVER = Driver()


def _allocate(memories, size):
    """Return an address of new memory, at a multiple of 512 as CUDA's; a dictionary holds it."""
    memory = np.empty(size + 512, np.uint8)
    first = -memory.ctypes.data % 512
    memory = memory[first : first + max(size, 1)]
    address = memory.ctypes.data
    memories[address] = memory
    return address


def bytes_at(address, size):
    """Return memory as ctypes has it."""
    return (ctypes.c_uint8 * size).from_address(address)


_KINDS = {
    "PyObject *": ctypes.py_object, "int": ctypes.c_int, "unsigned int": ctypes.c_uint,
    "size_t": ctypes.c_size_t, "intptr_t": ctypes.c_ssize_t, "void": None,
}  # fmt: skip
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_kept = []  # callbacks and names: CuPy's modules hold their addresses


def _replace(table, name, function):
    """Put a Python function into a Cython module's table of C functions."""
    signature = _capsule_name(table[name])
    result, _, arguments = signature.decode().removesuffix(")").partition("(")
    arguments = [each.strip() for each in arguments.split(",")]
    kinds = [_KINDS.get(each.split(" __pyx")[0], ctypes.c_void_p) for each in arguments if each != "void"]
    values = sum("__pyx" not in each and each != "void" for each in arguments)  # no flags of Cython's own
    kind = _KINDS.get(result.strip(), ctypes.py_object)

    def called(*arguments):
        try:
            return function(*arguments[:values])
        except BaseException as error:  # which ctypes cannot hand on to the caller
            DRIVER.errors.append(error)
            return None if kind is ctypes.py_object else 0

    callback, label = ctypes.PYFUNCTYPE(kind, *kinds)(called), ctypes.create_string_buffer(signature)
    _kept.extend((callback, label))
    table[name] = _capsule(ctypes.cast(callback, ctypes.c_void_p), ctypes.addressof(label), None)


def functions():
    """Return the functions that are replaced, each with the module of CuPy's that it belongs to."""
    found = []
    for part in ("runtime", "driver"):
        module = importlib.import_module(f"cupy_backends.cuda.api.{part}")
        names = [name for name in module.__pyx_capi__ if hasattr(Driver, name)]
        found += [(module, name, getattr(DRIVER, name)) for name in names]
    return found


def load():
    """Import CuPy onto the stub, once in a process; skip where there is none, or a driver is."""
    if _kept:
        return
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is an NVIDIA driver, which tests/test_gpu.py uses; a process has one")
    assert "cupy" not in sys.modules, "CuPy was imported before the stub could take the driver's place"
    for module, name, function in functions():
        _replace(module.__pyx_capi__, name, function)
    import cupy.cuda.compiler as compiler
    from cupy.cuda._compiler_cache import DiskKernelCacheBackend

    nvrtc = compiler._compile_using_nvrtc_no_warning

    def compiled(source, *arguments, **options):
        if elementwise.is_elementwise(source):
            return source.encode(), None  # its image, for `launchKernel`
        return nvrtc(source, *arguments, **options)

    compiler._compile_using_nvrtc_no_warning = compiled
    folder = Path(tempfile.gettempdir()) / f"sbncore-stub-driver-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    compiler._set_kernel_cache_backend(DiskKernelCacheBackend(str(folder)))


def hook():
    """Return a hook that shows the emulators what CuPy's pool hands out, and takes back."""
    from cupy.cuda import MemoryHook

    class Hook(MemoryHook):
        name = "stub driver"

        def malloc_postprocess(self, *, device_id, size, mem_size, mem_ptr, pmem_id):
            if size:
                memory = np.ctypeslib.as_array(bytes_at(mem_ptr, size))
                memory.fill(emulation.UNWRITTEN)
                DRIVER.emulators[DRIVER.owner(mem_ptr)].name(memory, written=False)

        def free_postprocess(self, *, device_id, mem_size, mem_ptr, pmem_id):
            DRIVER.emulators[DRIVER.owner(mem_ptr) or 0].forget(mem_ptr)

    return Hook()


@pytest.fixture
def cupy(monkeypatch):
    """CuPy on the stub, with emulators of all types but float64; `DRIVER` records what it is asked."""
    load()
    import cupy

    for module, name, function in functions():
        monkeypatch.setattr(module, name, function, raising=False)
    libraries = [emulation.build((kind,)) for kind in ("float", "float16", "bfloat16")]
    DRIVER.begin([emulation.EmulatedDevice(libraries) for _ in range(DEVICES)])
    monkeypatch.setattr(driver, "_library", lambda: DRIVER)
    compile_ = device.Device._compiled

    def compiled(self, name):
        function = compile_(self, name)
        DRIVER.kernels[function] = name
        return function

    monkeypatch.setattr(device.Device, "_compiled", compiled)
    monkeypatch.setattr(arguments, "_prepared", {})
    caches = device.cupy, device.device_at, call.call_for
    for cached in caches:
        cached.cache_clear()
    with hook():
        yield cupy
        gc.collect()
    for cached in caches:
        cached.cache_clear()
    for each in range(DEVICES):
        with cupy.cuda.Device(each):
            cupy.get_default_memory_pool().free_all_blocks()
    assert not DRIVER.errors
