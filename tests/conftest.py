"""One table of tolerances, the judge's measure, and the profile Hypothesis runs under."""

import os

import numpy as np
import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a machine with a GPU may lack it; its tests are skipped there
    pass
else:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]  # a first compilation, not the data
    settings.register_profile("default", deadline=None, suppress_health_check=slow)
    settings.register_profile(
        "ci", parent=settings.get_profile("default"), derandomize=True, database=None, print_blob=True
    )
    settings.load_profile("ci" if os.environ.get("CI") else "default")

TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def error(a, b):
    """max|a - b| / max(1, max|b|), in float64; where b is beyond the range of a, a is infinite."""
    with np.errstate(over="ignore"):
        largest = np.asarray(b).astype(np.asarray(a).dtype).astype(np.float64)
    a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    assert a.shape == b.shape
    right = np.isinf(largest) & (a == largest)
    a, b = np.where(right, 0, a), np.where(right, 0, b)
    return np.abs(a - b).max(initial=0) / max(1, np.abs(b).max(initial=0))


@pytest.fixture
def rng():
    return np.random.default_rng(20210123)
