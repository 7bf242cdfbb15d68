"""`python -m bench start`: new processes, whose figures have their form and say what was compiled."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("no bench beside the tests", allow_module_level=True)

from bench import start  # noqa: E402


def test_quick(tmp_path):
    command = [sys.executable, "-m", "bench", "start", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no cache: 100%" in done.stderr
    text = (tmp_path / "start-cpu.md").read_text(encoding="utf-8")
    assert text == done.stdout
    assert text.startswith("# Starting on the CPU\n\n")
    assert f"cores, {start.sbn.get_num_threads()} threads used" in text
    assert f"`python -m bench start --quick --out {tmp_path}`." in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    found = {tuple(row[:2]): row[2:] for row in rows}
    for name in start.IMPORTS:
        loaded = name == "numba"
        seconds, compiled = found[f"`import {name}`", str(loaded)]
        assert 0 < float(seconds) < 60 and compiled == "0"
    for layout, option in start.QUICK:
        wheel, cold, compiled, warm, second, warnings = found[f"channels-{layout}", option]
        assert float(cold) > float(warm) > 1e-3 * float(second) > 0 and float(cold) > float(wheel) > 0
        assert int(compiled) == (1 if option == "inference" else 4) and warnings == "0"
    layout, option = start.QUICK[0]
    key = f"channels-{layout}", f"{option}, no writable cache"
    _, cold, _, _, second, warnings = found[key]
    assert float(cold) > 1e-3 * float(second) > 0 and warnings == "1"
    assert len(rows) == 2 + len(start.IMPORTS) + len(start.QUICK) + 1  # with the titles


def test_a_wrong_result_is_told_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "CALLS", "raise ValueError('y is off by 1, {}, {}')")
    monkeypatch.setattr(start, "IMPORTS", ())
    with pytest.raises(SystemExit, match=r"channels-last, inference: failed(.|\n)*y is off by 1"):
        start.main(["--quick", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", start.OPTIONS)
@pytest.mark.parametrize("layout", ["first", "last"])
def test_every_case_is_called_and_judged(monkeypatch, capsys, layout, option):
    start.calls(layout, option)
    first, second, _ = capsys.readouterr().out.split()
    assert float(first) > 0 and float(second) > 0
    exact = start.cases.Tolerance(0.0, 0.0, 1e-3)
    monkeypatch.setattr(start.cases, "TOLERANCE", dict.fromkeys(start.cases.TOLERANCE, exact))
    with pytest.raises(start.cases.WrongResult, match=f"on 16×64×.* channels-{layout} .*is off by"):
        start.calls(layout, option)
