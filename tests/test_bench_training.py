"""The training benchmark: its options, what it writes, how it goes on, and the speed of a step."""

import csv
import gc
import json
import subprocess
import sys
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tables import unpadded

import sbncore as sbn

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("no bench beside the tests", allow_module_level=True)

from bench import data, normalizations, suites, sweep, trainee, training  # noqa: E402
from bench.networks import NETWORKS, build  # noqa: E402


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_follows_from_its_seed(name):
    before = torch.get_rng_state()
    a, b, c = (build(name, 1, 10, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(1, 28, 28), (3, 32, 32), (1, 8, 8)])
def test_the_network_takes_small_images_and_can_be_traced(name, size):
    network = build(name, size[0], 7, 0)
    x = torch.randn(5, *size)
    y = network(x)
    assert y.shape == (5, 7)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), y)


@pytest.mark.parametrize("name, expected", [
    ("full", sbn.Full()),
    ("bs/8", sbn.BatchSampling(1 / 8)),
    ("fs-common/4", sbn.FeatureSampling(1 / 4, "patch", "common")),
    ("fs-runs/16@1024", sbn.FeatureSampling(1 / 16, "runs", at_least=1024)),
    ("vdn/16", sbn.VirtualSamples(2)),
    ("vdn:4", sbn.VirtualSamples(4)),
    ("bs/32+vdn/32", sbn.Mixture([(0.5, sbn.BatchSampling(1 / 32)), (0.5, sbn.VirtualSamples(1))])),
    ("3*full+1*vdn:4", sbn.Mixture([(0.75, sbn.Full()), (0.25, sbn.VirtualSamples(4))])),
    ("prior:0.3|fs/4", sbn.Prior(0.3, sbn.FeatureSampling(1 / 4))),
])  # fmt: skip
def test_names_of_normalizations(name, expected):
    assert normalizations.sampler(name, 32) == expected


@pytest.mark.parametrize("name", [
    "", "fs", "fs/0", "fs/0.5", "fs/4@0", "vdn/4@9", "xs/4", "a*full", "prior:0.3", "full+", "vdn:x",
])  # fmt: skip
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="expected "):
        normalizations.sampler(name, 32)


@pytest.mark.parametrize("name", ["group norm", "batch renorm", "vdn:4", "fs/4", "prior:0.5|full"])
def test_a_network_is_normalized_by_it(name):
    network = normalizations.normalized(build("resnet", 1, 4, 0), name, batch=8, steps=10).train()
    kinds = {type(module).__name__ for module in network.modules()}
    assert "BatchNorm2d" not in kinds
    y = network(torch.randn(8, 1, 8, 8))
    assert y.shape == (8, 4) and torch.isfinite(y).all()


def test_batch_renormalization_begins_as_batch_normalization_and_ends_near_its_evaluation():
    like = torch.nn.BatchNorm2d(3)
    layer, x = normalizations.BatchRenorm(torch.nn.BatchNorm2d(3), rise=4), torch.randn(6, 3, 5, 5) * 2 + 1
    torch.testing.assert_close(layer(x), like(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_var, like.running_var)
    for _ in range(200):
        y = layer(x)
    torch.testing.assert_close(y, layer.eval()(x), rtol=1e-3, atol=1e-3)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Digits, on one thread."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")
    threads = torch.get_num_threads(), sbn.get_num_threads()
    sweep.dataset.cache_clear()
    yield tmp_path
    torch.set_num_threads(threads[0])
    sbn.set_num_threads(threads[1])


TINY = ["--data", "digits", "--norms", "full,fs/4", "--images", "64", "--epochs", "1", "--seeds", "2"]
TINY += ["--batches", "16", "--jobs", "1"]


def test_a_sweep_writes_goes_on_and_is_the_same_again(small, capfd, monkeypatch):
    pytest.importorskip("matplotlib")
    training.main([*TINY, "--out", str(small)])
    printed = capfd.readouterr()
    path = small / "training-accuracy.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    wanted = [("full", 0), ("fs/4", 0), ("full", 1), ("fs/4", 1)]
    assert [(line["norm"], line["seed"]) for line in lines] == wanted
    for line in lines:
        assert 0 <= line["accuracy"] <= 1 and 0 < line["share"] < 1 and len(line["losses"]) == 4
        assert line["accuracies"][-1] == [4, line["accuracy"]] and line["step_ms"] > 0 and line["date"]
    assert "scikit-learn's digits, 64 images of 8×8, 1 epochs" in printed.out
    table = unpadded(printed.out)
    assert "| full | 2 | " in table and "| +0.00 ± 0.00 | " in table
    assert (small / "training-accuracy.md").read_text(encoding="utf-8").endswith(printed.out)
    assert (small / "training-accuracy.png").stat().st_size > 10_000

    whole = path.read_text(encoding="utf-8")
    kept = whole[: whole.index("\n") + 1]
    path.write_text(kept + whole[len(kept) :][:50], encoding="utf-8")  # stopped in the middle of a line
    right, trained = sweep.train, []
    monkeypatch.setattr(sweep, "train", lambda spec, *rest: trained.append(spec) or right(spec, *rest))
    training.main([*TINY, "--out", str(small)])
    again = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(trained) == 3 and path.read_text(encoding="utf-8").startswith(kept)
    for line in (*lines, *again):
        del line["share"], line["step_ms"]
    assert again == lines


@pytest.mark.parametrize("line", ["junk", "{}", "[1]", '{"network": 3}'])
def test_a_file_of_something_else_is_left_as_it_is(small, line):
    path = small / "training-accuracy.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"accuracy\.jsonl: expected a training as line 1, got "):
        training.main([*TINY, "--out", str(small)])
    assert path.read_text(encoding="utf-8") == line + "\n"


def leave_a_mark(spec, device, where):
    (Path(where) / str(spec.seed)).touch()
    if spec.seed == 0:
        raise RuntimeError("the first fails")
    time.sleep(0.2)


def test_what_waits_is_not_trained_after_a_failure(small, monkeypatch):
    asked = []

    class Pool(ProcessPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            asked.append(cancel_futures)  # a second call without it would take the first one back
            super().shutdown(wait, cancel_futures=cancel_futures)

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(sweep, "train", leave_a_mark)
    specs = [sweep.Spec("plain", "digits", 48, 1, 16, 0.05, "full", "exact", seed) for seed in range(30)]
    with pytest.raises(RuntimeError, match="the first fails"):
        sweep.sweep(specs, None, jobs=2, threads=1, device="cpu", where=str(small))
    assert 1 <= len(list(small.iterdir())) < len(specs) and asked == [True]


def test_trainings_side_by_side_are_the_same(small):
    spec = sweep.Spec("plain", "digits", 48, 1, 16, 0.05, "fs/4", "exact", 0)
    one = sweep.sweep([spec], None, jobs=1, threads=1, device="cpu", where="here")
    both = [spec, replace(spec, seed=1)]
    two = sweep.sweep([*both, spec], None, jobs=2, threads=1, device="cpu", where="here")
    assert [run.spec for run in two] == both
    assert two[0].losses == one[0].losses != two[1].losses and two[0].accuracy == one[0].accuracy
    assert sweep.Run.of(one[0].line()) == one[0]


def test_nothing_is_written_without_a_folder(small, monkeypatch):
    monkeypatch.chdir(small)
    training.main(TINY)
    assert not list(small.iterdir())


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_suite_names_what_there_is(name):
    suite = suites.SUITES[name]
    for norm in suite.norms:
        for batch in suite.batches:
            normalizations.normalized(build("plain", 1, 2, 0), norm, batch=batch, steps=1)
    assert set(suite.networks) <= set(NETWORKS)


def test_full_sampling_learns_as_pytorch_does(small):
    few, settings = data.load("digits").subset(64), trainee.Settings(batch=16)
    batch = settings.tensors(few.x[:16], few.labels[:16])
    network = build("resnet", 1, 10, 0)
    pair = trainee.converted(network, sbn.Full(), 0), network
    ours, theirs = ([trainee.Trainee(one, settings, 6).step(*batch)[0] for _ in range(6)] for one in pair)
    for a, b in zip(ours, theirs, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-3)


def test_a_wrong_result_aborts(small, monkeypatch):
    right = trainee.converted

    def wrong(network, *given):
        network = right(network, *given)
        with torch.no_grad():
            network.fc.weight += 1e-2
        return network

    monkeypatch.setattr(trainee, "converted", wrong)
    monkeypatch.setattr(sweep, "train", lambda *_: pytest.fail("trained before it was right"))
    with pytest.raises(SystemExit, match=r"nothing is timed: .* by Full\(\) is off by"):
        training.main([*TINY, "--out", str(small)])


@pytest.mark.parametrize(
    "wrong",
    [
        "--suite none", "--epochs 0", "--images -5", "--batches 1.5", "--seeds x", "--jobs 0",
        "--device tpu", "--rates 0.2,-1", "--rates nan", f"--out {__file__}",
    ],
)  # fmt: skip
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        training.main(wrong.split())
    name, value = wrong.split()
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and f"error: argument {name}: " in complaint and value in complaint


@pytest.mark.parametrize("wrong, complaint", [
    (["--networks", "plain,vgg"], "--networks: expected plain, resnet, 1d, got 'vgg'"),
    (["--gradients", "none"], "--gradients: expected exact, sampled, detached, got 'none'"),
    (["--norms", "full,xs/3"], "--norms: expected full, .* got 'xs/3'"),
    (["--images", "1298"], "--images: expected at most the 1297 of .* digits, got 1298"),
    (["--images", "8", "--batches", "4"], "--images: .* each of the 10 classes, got 8 without"),
    (["--images", "8", "--batches", "9"], "--batches: expected at most the 8 images there are, got 9"),
])  # fmt: skip
def test_what_there_is_not(small, wrong, complaint):
    with pytest.raises(SystemExit, match=complaint):
        training.main(["--data", "digits", *wrong])


def test_rates_are_apart(small, capfd):
    training.main([*TINY, "--seeds", "1", "--batches", "8,16", "--rates", "0.1,0.2", "--norms", "full"])
    printed = unpadded(capfd.readouterr().out)
    for rate in ("0.1", "0.2"):
        assert f"## plain, rate {rate} for 128 images: accuracy by batch size" in printed
    assert printed.count("| full | 1 | ") == 4 and "batches of 8, rate 0.0125" in printed


def test_a_results_file_of_bytes(small):
    (small / "training-accuracy.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(SystemExit, match=r"accuracy\.jsonl: expected a file of trainings, got 'utf-8'"):
        training.main([*TINY, "--out", str(small)])


def test_without_pytorch_or_a_gpu(small, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="--device cuda: expected a CUDA device, PyTorch finds none"):
            training.main([*TINY, "--device", "cuda"])
    monkeypatch.setattr(training, "torch", None)
    with pytest.raises(SystemExit, match="needs PyTorch, which is not installed: pip install torch"):
        training.main([])


def test_it_is_among_the_benchmarks():
    command = [sys.executable, "-m", "bench", "training", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--suite" in done.stdout and "prior:0.3|full" in done.stdout


def test_the_speed_of_a_step_and_normalizations_share(tmp_path, monkeypatch, capsys):
    from bench import speed

    monkeypatch.setattr(speed, "IMAGE", (2, 8, 8))
    training.main(
        ["--speed", "--rounds", "2", "--batches", "4", "--autocast", "bfloat16", "--out", str(tmp_path)]
    )
    text = (tmp_path / "training-speed.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in text
    with (tmp_path / "training-speed.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["normalization"] for row in rows] == [speed.FULL_BN, *speed.SAMPLERS]
    for row in rows:
        assert 0 < float(row["share"]) < 1 and 0 < float(row["step_p20"]) <= float(row["step_p80"])
        assert 0.9 < float(row["kept"]) / float(rows[0]["kept"]) < 1.1


def test_counting_what_autograd_keeps_leaves_no_graph_behind():
    from bench import memory

    seen = []

    class Network(torch.nn.Linear):
        def forward(self, x):
            hidden = torch.sigmoid(super().forward(x))  # whose backward needs it
            seen.append(weakref.ref(hidden))
            return 2 * hidden

    x = torch.randn(8, 16)
    assert memory.kept(Network(16, 16), x) == 8 * 16 * 4
    gc.collect()
    assert seen[0]() is None


@pytest.mark.parametrize("wrong, complaint", [
    (["--speed", "--epochs", "1"], "--epochs is not for --speed"),
    (["--speed", "--norms", "full"], "--norms is not for --speed"),
    (["--rounds", "3"], "--rounds, --channels-last and --autocast need --speed"),
    (["--speed", "--networks", "plain,1d"], "--networks: expected one with --speed, got 2"),
    (["--speed", "--networks", "none-such"], "got 'none-such'"),
])  # fmt: skip
def test_what_the_speed_of_a_step_takes(wrong, complaint, capsys):
    with pytest.raises(SystemExit) as exit:
        training.main(wrong)
    assert complaint in capsys.readouterr().err + str(exit.value)


def test_the_fidelity_on_real_activations(small, capsys):
    pytest.importorskip("matplotlib")
    from bench import fidelity

    fidelity.main(["--quick", "--data", "digits", "--out", str(small)])
    printed = capsys.readouterr().out
    assert (small / "fidelity-plain.md").read_text(encoding="utf-8").endswith(printed)
    assert (small / "fidelity-plain.png").stat().st_size > 10_000
    with (small / "fidelity-plain.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * len(fidelity.FAMILIES) * len(fidelity.RATIOS)
    errors = {(row["layer"], row["sampler"]): float(row["mean_error"]) for row in rows}
    assert errors["features.1", "bs/4"] < errors["features.1", "bs/64"]
    assert unpadded(printed).splitlines()[-1].startswith("| features.13, 128×64×2×2 | vdn/16 | ")
