"""The benchmarks run, judge before they time, and write what they measured."""

import csv
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sbncore as sbn

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("no bench beside the tests", allow_module_level=True)

from bench import cuda, goals, layer, peers, timing  # noqa: E402


@pytest.fixture(autouse=True)
def _malloc_as_it_is(monkeypatch):
    monkeypatch.setattr(timing, "keep_pages", lambda: True)


def test_layer_quick(tmp_path):
    command = [sys.executable, "-m", "bench", "layer", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "layer-cpu.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    peers_found = {row["peer"] for row in rows}
    assert {"copy", "NumPy"} <= peers_found
    shapes, layouts, samplers, phases = 2, 2, 3, 3
    assert len(rows) == shapes * layouts * samplers * phases * len(peers_found)
    for row in rows:
        assert float(row["ours_p20"]) <= float(row["ours_median"]) <= float(row["ours_p80"])
        assert float(row["peer_over_ours"]) > 0 and int(row["rounds"]) == layer.QUICK_ROUNDS
        assert row["cpu"] and row["date"] and "NumPy" in row["versions"]
    short = (tmp_path / "layer-cpu.md").read_text(encoding="utf-8")
    assert short.startswith("# One BN layer on the CPU (float32)\n")
    titles = "| shape | layout | forward / copy | backward / copy | NumPy / ours | PyTorch eager / ours |"
    assert titles in short
    assert "8×256×7×7 | channels-last" in short and "**geometric mean**" in short
    assert all(
        f"## {name}" in (tmp_path / "layer-cpu-long.md").read_text(encoding="utf-8")
        for name in ("Full()", "BatchSampling(1/16)", "FeatureSampling(1/16)")
    )


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_wrong_result_aborts(tmp_path, monkeypatch, phase):
    right = getattr(sbn, phase)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        result[0][-1, -1, -1] += np.float32(1e-3)  # one row of y or of dx, in place
        return result

    monkeypatch.setattr(sbn, phase, wrong)
    monkeypatch.setattr(timing, "alternate", lambda *_: pytest.fail("timed before it was right"))
    differs = {"forward": "y is off by", "backward": "the gradient of x is off by"}[phase]
    with pytest.raises(SystemExit, match=rf"wrong result.*Full\(\) on 8×64×28×28 .*{differs}"):
        layer.main(["--quick", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_options_without_pytorch(tmp_path, monkeypatch, capsys, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    monkeypatch.setattr(peers, "torch_version", lambda: None)
    layer.main(
        ["--shapes", "4x6x40", "3x5x4x6x7", "--samplers", "fs/4", "--dtype", dtype, "--activation", "relu",
         "--residual", "--rounds", "2", "--out", str(tmp_path)]
    )  # fmt: skip
    assert "PyTorch is not installed" in capsys.readouterr().err
    text = (tmp_path / f"layer-cpu-{dtype}-relu-residual.md").read_text(encoding="utf-8")
    assert "FeatureSampling(1/4):" in text and "3×5×4×6×7" in text and "not measured" in text


def test_rounds_alternate_and_a_slow_contender_sits_some_out(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0)
    monkeypatch.setattr(timing, "PATIENCE", 0.0)
    calls = []
    fast, slow = {"forward": lambda: calls.append("fast")}, {"forward": lambda: calls.append("slow")}
    times = timing.alternate({"fast": fast, "slow": slow}, 20)
    took = {name: np.isfinite(one["forward"]) for name, one in times.items()}
    assert took["slow"].sum() == timing.FEWEST and calls.count("slow") == timing.FEWEST + timing.WARM_UP
    assert timing.shared(times["fast"]["forward"], times["slow"]["forward"]) == timing.FEWEST
    measured = calls[2 * timing.WARM_UP :]
    assert all(measured[i] != measured[i + 1] for i in range(0, len(measured), 2))  # each once a round


def test_ratios_are_within_rounds():
    ours, peer = np.array([1.0, 2, np.nan, 4]), np.array([2.0, 4, 100, np.nan])
    assert timing.ratio(peer, ours) == 2
    assert timing.summary(ours / 1e3) == pytest.approx((2, 1.4, 3.2))
    assert timing.geometric_mean([1, 4]) == pytest.approx(2)


@pytest.mark.parametrize("wrong", [["--shapes", "32x64"], ["--samplers", "fs"], ["--rounds", "0"]])
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        layer.main(wrong)
    assert "expected" in capsys.readouterr().err


def test_dispatch_names_the_benchmarks():
    command = [sys.executable, "-m", "bench", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "layer" in done.stderr and "nothing" in done.stderr


def gpu_rows():
    shapes = [(256, 64, 112, 112), (256, 64, 56, 56), (32, 64, 56, 56)]
    for shape, last, (relu, residual) in itertools.product(shapes, (False, True), cuda.VARIANTS):
        case = goals.Case(shape, "float16", last, relu, residual)
        copy = 2 * case.nbytes / 4e6  # microseconds at 4 TB/s
        yield goals.Row(case, "copy", "copy", copy, copy, copy, 2 * case.nbytes, 1.0)
        for phase in ("forward", "backward", "both"):
            moved = case.moved(phase)
            for name, speed in (("ours", 0.8), ("graph", 0.95), ("PyTorch", 0.4)):
                median = moved / 4e6 / speed
                yield goals.Row(case, name, phase, median, median, median, moved, speed)


def test_the_bytes_that_each_variant_must_move():
    plain, relu, add = (goals.Case((256, 64, 56, 56), "float16", False, *v) for v in cuda.VARIANTS)
    N = plain.nbytes
    assert N == 256 * 64 * 56 * 56 * 2 and add.variant == "BN+add+ReLU" and plain.layout == "channels-first"
    assert plain.moved("forward") / N == relu.moved("forward") / N == 2 + 1 / 16
    assert plain.moved("backward") / N == relu.moved("backward") / N == 3 + 3 / 16
    assert add.moved("forward") / N == 3 + 1 / 16 + 1 / 16  # the residual; a bit for each 16
    assert add.moved("backward") / N == 4 + 3 / 16 + 1 / 16
    for case in (plain, relu, add):
        assert case.moved("both") == case.moved("forward") + case.moved("backward")


def test_goals_are_held_against_what_was_measured():
    found = goals.goals(list(gpu_rows()), {"ours forward": 12.0, "ours backward": 19.0})
    text = [str(goal) for goal in found]
    assert text[0].endswith("bandwidth: 0.95, at least 0.92: reached")
    assert "BN+ReLU, 100 MB and more: 2.00, at least 2.4: missed" in text[6]
    assert text[-2].endswith("12.00, at most 15: reached") and text[-1].endswith("at most 15: missed")
    over = next(goal for goal in found if "13 MB" in goal.what)
    small = goals.Case((32, 64, 56, 56), "float16", False, True, True)
    assert over.found == pytest.approx(small.moved("backward") / 4e6 * (1 / 0.95 - 1))
    assert all(str(goal).endswith("not measured") for goal in goals.goals([], {}))


def test_the_gpu_report_is_written(tmp_path, capsys):
    where = {"gpu": "A GPU 80GB", "driver": "1", "versions": "v", "commit": "c", "date": "2026-01-01"}
    goals.write(tmp_path, list(gpu_rows()), {"ours forward": 12.0}, where)
    assert "1.98" in capsys.readouterr().out
    text = (tmp_path / "layer-a-gpu-80gb.md").read_text()
    assert "A GPU 80GB, driver 1. v. Commit c, 2026-01-01." in text
    assert "| 256×64×56×56 | BN+add+ReLU |" in text and "## float16, channels-last" in text
    lines = (tmp_path / "layer-a-gpu-80gb.csv").read_text().splitlines()
    assert len(lines) == 1 + len(list(gpu_rows())) and lines[1].endswith("A GPU 80GB,1,v,c,2026-01-01")


def test_without_a_gpu_the_benchmark_says_so(capsys):
    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("CuPy is installed")
    with pytest.raises(SystemExit) as stopped:
        layer.main(["--device", "cuda"])
    assert stopped.value.code == 2 and "no CUDA device: arrays on a GPU need CuPy" in capsys.readouterr().err
