"""device.cu's own arithmetic, which the emulator replaces: what is no single instruction, compiled by g++."""

import ctypes
import re

import emulation
import ml_dtypes
import numpy as np

from sbncore.cuda import device


def section(pattern):
    """The one place of the kernels' source that a pattern matches."""
    (found,) = re.findall(pattern, device.source(), re.DOTALL)
    return found


def floats():
    """Every exponent with mantissas around each rounding, subnormals, infinities and NaN, of both signs."""
    mantissas = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x17FFF, 0x18000, 0x18001, 0x7FFFFF, 0x7F8000]
    bits = [sign | exponent << 23 | m for sign in (0, 1 << 31) for exponent in range(256) for m in mantissas]
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    return np.concatenate([np.array(bits, np.uint32), random]).view(np.float32)


def test_bfloat16_is_rounded_to_nearest_even_before_compute_capability_9():
    body = section(r"narrow\(bfloat16& to, float v\) \{\n#if __CUDA_ARCH__ >= 900\n.*?#else\n(.*?)#endif")
    built = emulation.library(
        '#include <cstring>\ntypedef unsigned int u32;\nstruct bfloat16 { unsigned short bits; };\n'
        "static u32 __float_as_uint(float v) { u32 b; memcpy(&b, &v, 4); return b; }\n"
        f"static void narrow(bfloat16& to, float v) {{\n{body}}}\n"
        'extern "C" void all(bfloat16* to, const float* v, int n) {\n'
        "    for (int i = 0; i < n; ++i) narrow(to[i], v[i]);\n}"
    )  # fmt: skip
    values = floats()
    found = np.empty(values.size, np.uint16)
    ctypes.CDLL(str(built)).all(
        ctypes.c_void_p(found.ctypes.data), ctypes.c_void_p(values.ctypes.data), values.size
    )
    with np.errstate(invalid="ignore", over="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(found[number], expected.view(np.uint16)[number])
    assert np.isnan(found.view(ml_dtypes.bfloat16)[~number].astype(np.float32)).all()


def test_all_other_conversions_are_instructions_of_the_right_rounding():
    """PTX fixes what these do: exact to a wider type, to nearest even to a narrower."""
    for kind, instruction in (
        ("widen(bfloat16 v)", "mov.b32 %0, {%1, %2}"), ("widen(float16 v)", "cvt.f32.f16 %0, %1"),
        ("narrow(float16& to, float v)", "cvt.rn.f16.f32 %0, %1"),
        ("narrow(bfloat16& to, float v)", "cvt.rn.bf16.f32 %0, %1"),
    ):  # fmt: skip
        first = re.search(r'asm\("(.*?);?"', device.source().partition(f" {kind} ")[2])
        assert first[1] == instruction
