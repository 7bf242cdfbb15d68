"""``python -m sbncore``: what it tells, and what it says where something is wrong."""

import importlib.util
import json
import subprocess
import sys

import pytest

from sbncore import __main__, environment
from sbncore.cpu import kernels


def test_a_process_tells_versions_and_ends_with_ok():
    done = subprocess.run([sys.executable, "-m", "sbncore"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "ok", done.stdout + done.stderr
    for name in ("sbncore ", "NumPy ", "CPU ", "threads ", "compiled kernels ", "GPU ", "CPU, float32"):
        assert any(line.startswith(name) for line in lines), name


def test_json_holds_the_same(capsys):
    __main__.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["environment"].keys() == environment.environment().keys()
    assert found["checks"]["CPU, float32, channels-last"] == "ok"


def test_what_is_off_is_named_and_exits_with_1(monkeypatch, capsys):
    forward = environment.functional.forward

    def wrong(x, *arguments, **options):
        y, saved = forward(x, *arguments, **options)
        return y * x.dtype.type(1.5), saved

    monkeypatch.setattr(environment.functional, "forward", wrong)
    with pytest.raises(SystemExit) as stopped:
        __main__.main([])
    said = capsys.readouterr().out
    assert stopped.value.code == 1 and "y is off by" in said
    assert said.splitlines()[-1].startswith("wrong: CPU, ")


def test_what_is_not_compiled_is_not_checked(monkeypatch):
    monkeypatch.setattr(environment, "_compiled", lambda dtype, axis: False)
    told = dict(environment.checks())
    assert told["CPU, float64, channels-first"].endswith("python -m sbncore warmup --dtype float64")
    assert told["CPU, float32, channels-first"] == "ok"


def test_without_numba_it_says_so_and_checks_no_cpu(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else found(name))
    kernels.cpu.cache_clear()
    kernels._llvm.cache_clear()
    assert "pip install numba" in environment.environment()["CPU"]
    assert not [what for what, _ in environment.checks() if what.startswith("CPU")]
