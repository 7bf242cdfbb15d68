"""The CUDA kernels, emulated, against the reference: the product of test_engine, on another engine."""

import emulation
import numpy as np
import pytest
from conftest import TOLERANCE, error
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, cases

import sbncore as sbn

NAMES = {"float64": "double", "float32": "float", "float16": "float16", "bfloat16": "bfloat16"}


def emulator(dtype, **options):
    return emulation.EmulatedDevice([emulation.build((NAMES[dtype],))], **options)


def check(case, device):
    y_true, true = case.truth()
    inputs = [a for a in (case.x, case.dy, case.residual, case.weight, case.bias) if a is not None]
    before = [array.copy() for array in inputs]
    with emulation.emulated(device):
        y, saved = case.forward()
        grads = sbn.backward(case.arrange(case.dy), saved)
    assert y.dtype == case.x.dtype and y.shape == case.arrange(case.x).shape
    tolerance = TOLERANCE[case.dtype]
    assert error(case.arranged_back(y), y_true) <= tolerance
    assert error(case.arranged_back(grads.x), true["x"]) <= tolerance
    for name in ("weight", "bias"):
        got, argument = getattr(grads, name), getattr(case, name)
        assert (got is None) == (argument is None)
        if got is not None:
            assert got.dtype == argument.dtype
            assert error(got, true[name]) <= tolerance
    if grads.residual is not None:
        assert error(case.arranged_back(grads.residual), true["residual"]) <= tolerance
    assert all((array == old).all() for array, old in zip(inputs, before, strict=True))


@settings(max_examples=300)
@given(cases(), st.sampled_from([1, 3, 16]), st.booleans(), st.integers(0, 2**32))
def test_emulated_kernels_are_the_references(case, multiprocessors, clusters, seed):
    check(case, emulator(case.dtype, multiprocessors=multiprocessors, clusters=clusters, seed=seed))
