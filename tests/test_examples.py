"""The examples run, and print what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "flax_digits.py": "flax", "tiny_batches.py": "torch", "fine_tune_a_resnet.py": "torch",
    "two_processes.py": "torch", "choose_samplers.py": "torch",
}  # fmt: skip


def percentages(text):
    return [float(word.rstrip("%,")) for word in text.split() if word.rstrip(",").endswith("%")]


def losses(text):
    return [float(number) for number in re.findall(r"loss ([0-9.]+)", text)]


PROMISED = {
    "numpy_loop.py": lambda text: percentages(text)[-1] > 85,
    "check_a_gradient.py": lambda text: "backward: right" in text and "forgetful: wrong" in text,
    "replay_a_draw.py": lambda text: text.count("True") == 2 and "#" in text,
    "tiny_batches.py": lambda text: percentages(text)[2] > max(percentages(text)[:2]),
    "fine_tune_a_resnet.py": lambda text: (
        percentages(text)[-1] > 80 and text.endswith("reverted: BatchNorm2d\n")
    ),
    "two_processes.py": lambda text: "statistics equal" in text and "statistics differ" in text,
    "choose_samplers.py": lambda text: text.count("error") >= 3 and losses(text)[1] < losses(text)[0],
    "flax_digits.py": lambda text: min(means := percentages(text)[3::4]) > 90 and max(means) - min(means) < 2,
    "cupy_arrays.py": lambda text: text.startswith("skipped, no GPU") or "agrees: True" in text,
}

if not EXAMPLES.is_dir():
    pytest.skip("no examples beside the tests", allow_module_level=True)


def test_every_example_is_tried():
    assert {path.name for path in EXAMPLES.glob("*.py")} == PROMISED.keys()


@pytest.mark.parametrize("name", PROMISED)
def test_examples_run(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    command = [sys.executable, EXAMPLES / name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert PROMISED[name](done.stdout), done.stdout
