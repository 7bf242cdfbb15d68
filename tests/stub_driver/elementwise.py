"""CuPy's elementwise kernels as host code: their own source, with carray.h in place of CuPy's headers."""

import ctypes
import functools
import re
from pathlib import Path

import emulation

HEADER = (Path(__file__).parent / "carray.h").read_text()
_HEAD = re.compile(r'extern "C" __global__ void (\w+)\((.*)\) \{')
_Written = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)


def is_elementwise(source):
    """Return whether a source is one of CuPy's elementwise kernels."""
    return "#include <cupy/carray.cuh>" in source and "CUPY_FOR(i, _ind.size())" in source


@functools.cache
class Kernel:
    """A kernel from CuPy's source of it."""

    def __init__(self, source):
        text = re.sub(r"#include.*", "", source)
        _, parameters = _HEAD.search(text).groups()
        name, kinds, written = _HEAD.search(text)[1], [], ""
        for k, parameter in enumerate(re.split(r", (?![^<]*>)", parameters)):
            kind = parameter.rpartition(" ")[0]
            kinds.append(kind)
            if kind.startswith("CArray"):
                written += f"    tell(*({kind}*)arguments[{k}], written);\n"
        arguments = ", ".join(f"*({kind}*)arguments[{k}]" for k, kind in enumerate(kinds))
        sizes = ", ".join(f"sizeof({kind})" for kind in kinds)
        text = (
            f"{HEADER}\n{text}\n"
            f'extern "C" const size_t count = {len(kinds)}, sizes[] = {{{sizes}}};\n'
            'extern "C" void run(void** arguments, Written* written) {\n'
            f"    {name}({arguments});\n{written}}}\n"
        )
        self._library = ctypes.CDLL(str(emulation.library(text)))
        number = ctypes.c_size_t.in_dll(self._library, "count").value
        self._sizes = list((ctypes.c_size_t * number).in_dll(self._library, "sizes"))

    def copied(self, arguments):
        """Return copies of the arguments that a launch points to."""
        pointers = (ctypes.c_void_p * len(self._sizes)).from_address(arguments)
        return [
            ctypes.create_string_buffer(ctypes.string_at(at, size), size)
            for at, size in zip(pointers, self._sizes, strict=True)
        ]

    def run(self, values, written):
        """Run, and call ``written`` with what it wrote: an address and bytes."""
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self._library.run(pointers, _Written(written))
