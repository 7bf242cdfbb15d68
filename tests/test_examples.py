"""The examples run, and print what they promise."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"tiny_batches.py": "torch"}


def percentages(text):
    return [float(word.rstrip("%")) for word in text.split() if word.endswith("%")]


PROMISED = {
    "numpy_loop.py": lambda text: percentages(text)[-1] > 85,
    "check_a_gradient.py": lambda text: "backward: right" in text and "forgetful: wrong" in text,
    "replay_a_draw.py": lambda text: text.count("True") == 2 and "#" in text,
    "tiny_batches.py": lambda text: percentages(text)[2] > max(percentages(text)[:2]),
}

if not EXAMPLES.is_dir():
    pytest.skip("no examples beside the tests", allow_module_level=True)


def test_every_example_is_tried():
    assert {path.name for path in EXAMPLES.glob("*.py")} == PROMISED.keys()


@pytest.mark.parametrize("name", PROMISED)
def test_examples_run(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert PROMISED[name](done.stdout), done.stdout
