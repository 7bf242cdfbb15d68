"""The benchmarks run, judge before they time, and write what they measured."""

import contextlib
import csv
import importlib.util
import itertools
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from tables import unpadded

import sbncore as sbn

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("no bench beside the tests", allow_module_level=True)

from bench import cases, contenders, cuda, goals, layer, layer_options, tables, timing  # noqa: E402
from bench.cases import Case, WrongResult  # noqa: E402
from bench.machine import Machine  # noqa: E402
from sbncore.cuda import device  # noqa: E402


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
        assert float(row["peer_over_ours"]) > 0 and int(row["rounds"]) == layer_options.QUICK_ROUNDS
        assert row["cpu"] and row["date"] and "NumPy" in row["versions"]
    short = (tmp_path / "layer-cpu.md").read_text(encoding="utf-8")
    assert short.startswith("# One BN layer on the CPU (float32)\n")
    short = unpadded(short)
    assert "| shape | layout | forward / copy | backward / copy | NumPy / ours |" in short
    assert ("| PyTorch eager / ours |" in short) == (importlib.util.find_spec("torch") is not None)
    assert (tmp_path / "layer-cpu.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    assert "8×256×7×7 | channels-last" in short and "**geometric mean**" in short
    assert all(
        f"## {name}, float32, BN\n" in (tmp_path / "layer-cpu-long.md").read_text(encoding="utf-8")
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
    for module in (contenders, layer_options):
        monkeypatch.setattr(module, "installed", lambda package: package != "torch")
    layer.main(
        ["--shapes", "4x6x40", "3x5x4x6x7", "--samplers", "fs/4", "--dtype", dtype, "--activation", "relu",
         "--residual", "--rounds", "2", "--out", str(tmp_path)]
    )  # fmt: skip
    assert "PyTorch is not installed" in capsys.readouterr().err
    text = (tmp_path / f"layer-cpu-{dtype}-relu-residual.md").read_text(encoding="utf-8")
    assert "## FeatureSampling(1/4), " in text and "3×5×4×6×7" in text and "PyTorch eager" not in text


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
    for shape, layout, (relu, residual) in itertools.product(
        shapes, ("first", "last"), layer_options.VARIANTS
    ):
        case = Case(shape, layout, "float16", relu, residual)
        copy = 2 * case.nbytes / 4e9  # milliseconds at 4 TB/s
        for phase, (call, speed) in itertools.product(tables.PHASES, (("", 0.8), (tables.GRAPH, 0.95))):
            moved = case.moved(phase)
            ours = moved / 4e9 / speed
            for peer, theirs in (("copy", copy), ("PyTorch", moved / 4e9 / 0.4)):
                yield tables.Row(
                    case, f"FeatureSampling(1/16){call}", phase, peer, ours, ours, ours, theirs, theirs,
                    theirs, theirs / ours, 9, 0.0, moved,
                )  # fmt: skip


def test_the_bytes_that_each_variant_must_move():
    variants = layer_options.VARIANTS
    plain, relu, add = (Case((256, 64, 56, 56), "first", "float16", *each) for each in variants)
    N = plain.nbytes
    assert N == 256 * 64 * 56 * 56 * 2 and add.variant == "BN+add+ReLU" and "channels-first" in str(plain)
    assert plain.moved("forward") / N == relu.moved("forward") / N == 2 + 1 / 16
    assert plain.moved("backward") / N == relu.moved("backward") / N == 3 + 3 / 16
    assert add.moved("forward") / N == 3 + 1 / 16 + 1 / 16  # the residual; a bit for each 16
    assert add.moved("backward") / N == 4 + 3 / 16 + 1 / 16
    for case in (plain, relu, add):
        assert case.moved("both") == case.moved("forward") + case.moved("backward")
    assert plain.moved("forward", 1) / N == 3


def test_goals_are_held_against_what_was_measured():
    rows = list(gpu_rows())
    found = goals.gpu_goals(rows, {"ours forward": 12.0, "ours backward": 19.0})
    text = [str(goal) for goal in found]
    assert text[0].endswith("bandwidth: 0.95, at least 0.92: reached")
    assert any("BN+ReLU, 100 MB and more: 2.00, at least 2.4: missed" in line for line in text)
    assert text[-2].endswith("12.00, at most 15: reached") and text[-1].endswith("at most 15: missed")
    over = next(goal for goal in found if "13 MB" in goal.what)
    small = Case((32, 64, 56, 56), "first", "float16", True, True)
    assert over.found == pytest.approx(small.moved("backward") / 4e6 * (1 / 0.95 - 1))
    assert all(str(goal).endswith("not measured") for goal in goals.gpu_goals([], {}))
    graphs = [row for row in rows if row.sampler.endswith(tables.GRAPH) and row.peer == "copy"]
    assert graphs and all(row.share == pytest.approx(0.95) for row in graphs)


WHERE = Machine("a cpu", 2, 2, "by default", "", "2026-01-01", "v", "c", "A GPU 80GB", "1")


def test_the_gpu_report_is_written(tmp_path, capsys):
    rows, gpu = list(gpu_rows()), cuda.Gpu(1, WHERE, lambda: None)
    options = layer_options.parsed(["--device", "cuda", "--out", str(tmp_path)])
    layer.write(options, rows, gpu, str(WHERE), {"ours forward": 12.0}, ["wrong result: ours"])
    assert "1.98" in capsys.readouterr().out
    assert (tmp_path / "layer-a-gpu-80gb.png").exists() == bool(importlib.util.find_spec("matplotlib"))
    text = unpadded((tmp_path / "layer-a-gpu-80gb.md").read_text(encoding="utf-8"))
    assert "A GPU 80GB, driver 1; a cpu, " in text and ". v. Commit c, 2026-01-01." in text
    assert "| 256×64×56×56 | channels-last | " in text
    long = unpadded((tmp_path / "layer-a-gpu-80gb-long.md").read_text(encoding="utf-8"))
    for call in ("", tables.GRAPH):
        assert f"## FeatureSampling(1/16){call}, float16, BN+add+ReLU" in text
        assert f"## FeatureSampling(1/16){call}, float16, BN+add+ReLU" in long
    assert "share, forward" in long and "| 95% | 95% |" in long
    after_measured = text.split("## Not measured")
    measured, after = after_measured
    assert "- wrong result: ours" in after and "## Goals" in after and "## Goals" not in measured
    assert "Host, microseconds a call: ours forward 12.0." in after
    with (tmp_path / "layer-a-gpu-80gb.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    wanted = {"gpu": "A GPU 80GB", "driver": "1", "versions": "v", "commit": "c", "date": "2026-01-01"}
    assert len(lines) == len(rows) and wanted.items() <= lines[0].items()


def gpu_cases(*arguments):
    return layer.cases(layer_options.parsed(["--device", "cuda", *arguments]))


def gpu_of(l2, monkeypatch):
    """A GPU's clockwork on the CPU's tensors."""
    monkeypatch.setattr(cuda.Gpu, "device", "cpu")
    return cuda.Gpu(l2, WHERE, lambda: None)


def test_the_cases_on_a_gpu(monkeypatch):
    every = gpu_cases()
    assert len(every) == len(set(every)) == 25 * 3 * 2 * 3
    assert {case.nbytes // cases.MB for case in every} >= {12, 33, 102}
    assert every[0].dtype == "float16" and layer.FOREMOST == {case.shape for case in every[: 8 * 18]}
    assert len(gpu_cases("--quick")) == 3 * 2 * 3
    few = gpu_cases("--shapes", "4x8x7x7", "--dtypes", "bfloat16", "float32", "--layouts", "last")
    assert [case.dtype for case in few] == ["bfloat16"] * 3 + ["float32"] * 3
    assert all(case.layout == "last" for case in few)
    assert {case.dtype for case in gpu_cases("--dtype", "float32")} == {"float32"}
    gpu = gpu_of(50 << 20, monkeypatch)
    for case in every:  # x and y, which a forward and a copy touch
        assert gpu.buffers(case) * 2 * case.nbytes >= 2 * (50 << 20)


@pytest.mark.parametrize(
    "wrong",
    ["--device cuda --dtype float64", "--device cuda --shapes 64x256x1024", "--device cuda --residual",
     "--device cuda --samplers full", "--dtypes float16", "--budget 9"],
)  # fmt: skip
def test_options_of_the_other_device_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        layer.main(wrong.split())
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


def test_a_wrong_or_failing_case_is_told_of_and_the_others_are_timed(monkeypatch, capsys):
    every, complaints = gpu_cases("--quick"), []
    seen = []

    def one(case, samplers, rounds, *_):
        seen.append((case, rounds))
        if case == every[1]:
            raise WrongResult("ours: y is off by 1")
        if case == every[2]:
            raise RuntimeError("out of memory\nand more")
        return [case]

    def swept(budget, rounds=None):
        options = layer_options.parsed(["--device", "cuda", "--quick"])
        options.budget, options.rounds = budget, rounds
        return layer.sweep(every, options, gpu_of(1, monkeypatch), time.perf_counter(), complaints)

    monkeypatch.setattr(layer, "measure", one)
    rows = swept(1e9)
    assert rows == [every[0], *every[3:]] and seen[0][1] == layer.MOST
    assert complaints[0] == "wrong result, not timed: ours: y is off by 1"
    assert complaints[1] == f"failed, not timed: {every[2]}: RuntimeError: out of memory"
    assert swept(-1.0) == []
    assert "18 of 18 cases left out: -1 s are over" in capsys.readouterr().err

    def hopeless(*_):
        raise RuntimeError("an illegal address")

    complaints.clear()
    monkeypatch.setattr(layer, "measure", hopeless)
    assert swept(1e9, 2) == [] and len(complaints) == layer.HOPELESS
    assert "nothing works" in capsys.readouterr().err


def test_the_time_left_decides_on_the_rounds():
    other = Case((32, 512, 7, 7), "first", "float16")
    rounds = [layer.rounds_for(other, 10, 20, 10.0, 10 + left) for left in (5, 15, 25)]
    assert rounds == [layer.FEWEST, layer.SOME, layer.MOST]
    foremost = Case((32, 64, 56, 56), "first", "float16")
    assert layer.rounds_for(foremost, 10, 20, 10.0, 0) == layer.MOST


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The CPU's tensors, a clock in place of events, calls in place of graphs."""
    pytest.importorskip("torch")

    def timed(call, repeats):
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats

    monkeypatch.setattr(cuda, "timed", timed)
    monkeypatch.setattr(cuda, "captured", lambda call, count: lambda: [call() for _ in range(count)])
    monkeypatch.setattr(cuda, "PATIENCE", 0.0)


OURS = [("FeatureSampling(1/16)", cuda.SAMPLER)]


def gpu_measure(case, rounds, gpu, complaints, against=("torch",)):
    return list(layer.measure(case, OURS, rounds, list(against), gpu, complaints))


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", layer_options.GPU_DTYPES)
def test_the_gpu_benchmark_on_cpu_tensors(on_the_cpu, monkeypatch, dtype, layout):
    for variant in layer_options.VARIANTS:
        case = Case((8, 6, 14, 14), layout, dtype, *variant)
        gpu = gpu_of(2 * case.nbytes, monkeypatch)
        assert gpu.buffers(case) == 2
        rows = gpu_measure(case, 2, gpu, [])
        found = {(row.sampler, row.phase, row.peer): row for row in rows}
        ours = ("FeatureSampling(1/16)", "FeatureSampling(1/16), graph")
        assert found.keys() == set(itertools.product(ours, tables.PHASES, ("copy", "PyTorch")))
        assert all(0 < row.ours_p20 <= row.ours_median <= row.ours_p80 for row in rows)
        assert all(0 < row.peer_p20 <= row.peer_median <= row.peer_p80 for row in rows)
        assert all(row.share > 0 and row.bytes == case.moved(row.phase) for row in rows)


def test_the_gpu_benchmark_from_its_options_to_its_files(on_the_cpu, monkeypatch, tmp_path, capsys):
    null = contextlib.nullcontext()
    runtime = types.SimpleNamespace(getDevice=lambda: 0, getDeviceProperties=lambda _: {"l2CacheSize": 1})
    pool = types.SimpleNamespace(free_all_blocks=lambda: None)
    fake = types.SimpleNamespace(
        __version__="1", cuda=types.SimpleNamespace(runtime=runtime), get_default_memory_pool=lambda: pool
    )
    on_gpu = types.SimpleNamespace(
        Stream=lambda: null, stream=lambda stream: stream, empty_cache=lambda: None,
        get_device_name=lambda: "A GPU",
    )  # fmt: skip
    torch = pytest.importorskip("torch")
    stub = types.SimpleNamespace(__version__="2", cuda=on_gpu, version=torch.version, backends=torch.backends)
    monkeypatch.setattr(device, "cupy", lambda: fake)
    monkeypatch.setattr(cuda, "_torch", lambda: stub)
    monkeypatch.setattr(cuda, "_shared", lambda *_: null)
    monkeypatch.setattr(cuda.Gpu, "device", "cpu")
    monkeypatch.setattr(cuda, "HOST_CALLS", 2)
    command = ["--device", "cuda", "--shapes", "4x8x7x7", "--dtypes", "float32", "--rounds", "2"]
    layer.main([*command, "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert "host, microseconds of a backward: " in printed.out and "100%" in printed.err
    with (tmp_path / "layer-a-gpu.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    calls, phases, peers = 2, 3, 2
    assert len(rows) == 2 * 3 * calls * phases * peers
    assert {row["gpu"] for row in rows} == {"A GPU"} and rows[0]["commit"]
    text = (tmp_path / "layer-a-gpu.md").read_text(encoding="utf-8")
    assert "host" in text and "`python -m bench layer --device cuda " in text


def test_the_hosts_cost_is_measured(on_the_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "HOST_CALLS", 2)
    costs = gpu_of(0, monkeypatch).host_costs(1)
    phases = tables.PHASES[:2]
    assert list(costs) == [f"{name} {phase}" for name in ("ours", "PyTorch") for phase in phases]


@pytest.mark.parametrize("name", ["y", "x", "weight", "bias", "residual"])
@pytest.mark.parametrize("who", ["Ours", "Torch"])
def test_the_gpu_benchmark_finds_a_wrong_result(on_the_cpu, monkeypatch, who, name):
    one = getattr(contenders, who)
    right = one.results
    wrong = (lambda a: a * 1.1) if name in ("y", "x", "residual") else (lambda a: a + 30)
    monkeypatch.setattr(timing, "alternate", lambda *_: pytest.fail("timed before it was right"))
    monkeypatch.setattr(
        one, "results", lambda self: {k: wrong(v) if k == name else v for k, v in right(self).items()}
    )
    case = Case((8, 6, 14, 14), "last", "float16", True, True)
    what = "y" if name == "y" else f"the gradient of {name}"
    with pytest.raises(WrongResult, match=f"on 8×6×14×14 .*: {what} is off by"):
        gpu_measure(case, 1, gpu_of(0, monkeypatch), [])


@pytest.mark.parametrize("phase", tables.PHASES)
def test_a_graph_that_captured_nothing_is_found(on_the_cpu, monkeypatch, phase):
    case = Case((8, 6, 14, 14), "first", "float32", True)
    ours = contenders.Ours(cases.Data(case, "cpu"), cuda.SAMPLER, "ours", repeated=True)
    ours.both()
    cuda.replayed(ours, phase, 1)()
    monkeypatch.setattr(cuda, "captured", lambda call, count: lambda: None)
    with pytest.raises(WrongResult, match=f"a graph of {phase} writes other bits"):
        cuda.replayed(ours, phase, 1)


def test_torch_compile_is_judged_or_left_out(on_the_cpu, monkeypatch):
    case, gpu = Case((8, 6, 14, 14), "first", "float16", True, True), gpu_of(0, monkeypatch)
    torch = pytest.importorskip("torch")
    calls, complaints, against = [], [], ("torch", "compile")
    monkeypatch.setattr(torch, "compile", lambda layer, **options: calls.append(options) or layer)
    rows = gpu_measure(case, 1, gpu, complaints, against)
    assert {row.peer for row in rows} > {"torch.compile"}
    assert calls == [{"fullgraph": True, "dynamic": False}]
    monkeypatch.setattr(torch, "compile", lambda *_, **__: 1 / 0)
    rows = gpu_measure(case, 1, gpu, complaints, against)
    assert "torch.compile" not in {row.peer for row in rows}
    assert len(complaints) == 1 and complaints[0].startswith("torch.compile left out: failed")


def test_torch_compile_is_asked_for_on_few_shapes(monkeypatch):
    asked = {}

    def noted(case, samplers, rounds, against, *_):
        asked[case] = against
        return []

    monkeypatch.setattr(layer, "measure", noted)
    options = layer_options.parsed(["--device", "cuda"])
    layer.sweep(layer.cases(options), options, gpu_of(1, monkeypatch), time.perf_counter(), [])
    compiled = {(case.shape, case.dtype) for case, against in asked.items() if "compile" in against}
    assert compiled == {(shape, "float16") for shape in layer.COMPILED} and options.against == ["torch"]


def test_without_a_gpu_the_benchmark_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    device.cupy.cache_clear()
    with pytest.raises(SystemExit) as stopped:
        layer.main(["--device", "cuda"])
    assert stopped.value.code == 2 and "no CUDA device: arrays on a GPU need CuPy" in capsys.readouterr().err
