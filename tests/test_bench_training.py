"""The training benchmark reads its images, judges before it times, and prints what it measured."""

import csv
import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sbncore as sbn

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("no bench beside the tests", allow_module_level=True)

from bench import data, training  # noqa: E402
from bench.resnet import resnet  # noqa: E402

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
IMAGES_TEST, LABELS_TEST = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays(rng):
    return {
        IMAGES: rng.integers(0, 256, (12, 9, 7)), LABELS: np.arange(12) % 3,
        IMAGES_TEST: rng.integers(0, 256, (5, 9, 7)), LABELS_TEST: np.arange(5) % 4,
    }  # fmt: skip


def put(folder, arrays, zipped=()):
    for name, array in arrays.items():
        if name in zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


@pytest.mark.parametrize("zipped", [(), (IMAGES, LABELS, IMAGES_TEST, LABELS_TEST), (IMAGES, LABELS_TEST)])
def test_idx_files_are_read(tmp_path, arrays, zipped):
    put(tmp_path, arrays, zipped)
    got = data.load(tmp_path)
    assert got.name == tmp_path.name and got.classes == 4
    assert got.x.shape == (12, 1, 9, 7) and got.x.dtype == np.float32 and got.labels.dtype == np.int64
    mean, deviation = arrays[IMAGES].mean(), arrays[IMAGES].std()
    np.testing.assert_allclose(got.x[:, 0], (arrays[IMAGES] - mean) / deviation, atol=1e-6)
    np.testing.assert_allclose(got.x_test[:, 0], (arrays[IMAGES_TEST] - mean) / deviation, atol=1e-6)
    np.testing.assert_array_equal(got.labels, arrays[LABELS])
    np.testing.assert_array_equal(got.labels_test, arrays[LABELS_TEST])
    assert len(got.first(4).x) == len(got.first(4).labels) == 4 and len(got.first(4).x_test) == 5


MALFORMED = {
    "missing": (lambda a: {LABELS: None}, f"expected a file {LABELS} or {LABELS}.gz, got neither"),
    "empty": (lambda a: {IMAGES: b""}, "images-idx3-ubyte: expected an IDX file .* got an empty file"),
    "gzip, named as if it were not": (
        lambda a: {IMAGES: gzip.compress(idx(a[IMAGES]))}, "begins 00 00 08 03, got 1f 8b"
    ),
    "not gzip": (
        lambda a: {IMAGES: None, f"{IMAGES}.gz": idx(a[IMAGES])}, "ubyte.gz: expected a gzip file, got Not a"
    ),
    "gzip, cut": (
        lambda a: {IMAGES: None, f"{IMAGES}.gz": gzip.compress(idx(a[IMAGES]))[:-20]},
        "ubyte.gz: expected a gzip file, got Compressed file ended",
    ),
    "gzip, garbled": (
        lambda a: {IMAGES: None, f"{IMAGES}.gz": gzip.compress(idx(a[IMAGES]))[:10] + b"\xff" * 99},
        "ubyte.gz: expected a gzip file, got Error -3",
    ),
    "labels for images": (lambda a: {IMAGES: idx(a[LABELS])}, "begins 00 00 08 03, got 00 00 08 01"),
    "header, cut": (lambda a: {LABELS: idx(a[LABELS])[:6]}, "expected a header of 8 bytes, got 6"),
    "values, cut": (lambda a: {IMAGES: idx(a[IMAGES])[:-1]}, "12 × 9 × 7 of them .* got 755"),
    "values, too many": (lambda a: {LABELS: idx(a[LABELS]) + b"1"}, "12 of them as its header says, got 13"),
    "no image": (lambda a: {IMAGES: idx(a[IMAGES][:0])}, "at least 1 value, and 0 × 9 × 7 of them"),
    "fewer labels": (lambda a: {LABELS: idx(a[LABELS][1:])}, f"{LABELS}: expected 12 labels, .* got 11"),
    "other size": (
        lambda a: {IMAGES_TEST: idx(a[IMAGES_TEST][:, 1:])}, f"{IMAGES_TEST}: expected .* 9×7, .* got 8×7"
    ),
    "all the same": (lambda a: {IMAGES: idx(a[IMAGES] * 0 + 3)}, "images that differ, got the value 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(tmp_path, arrays, case):
    put(tmp_path, arrays)
    change, message = MALFORMED[case]
    for name, content in change(arrays).items():
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(data.BadData, match=message) as complaint:
        data.load(tmp_path)
    assert str(tmp_path) in str(complaint.value) or case == "all the same"


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(data.BadData, match="expected a folder of IDX files, got nothing there"):
        data.load(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="expected a folder of IDX files, got a file"):
        training.main(["--data", str(tmp_path / "file")])


def test_fashion_mnist_where_debian_puts_it(tmp_path, arrays, monkeypatch, capsys):
    monkeypatch.setattr(data, "DEBIAN", tmp_path)
    put(tmp_path, arrays)
    assert data.load().name == "Fashion-MNIST" and capsys.readouterr().err == ""


def test_digits_instead_are_said_aloud(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")
    got = data.load()
    said = capsys.readouterr().err
    remedy = "Fashion-MNIST is not installed (apt install dataset-fashion-mnist, or --data FOLDER)"
    assert said == f"{remedy}: scikit-learn's digits instead\n"
    assert got.x.shape == (1297, 1, 8, 8) and len(got.x_test) == 500 and got.classes == 10
    assert abs(got.x.mean()) < 1e-5 and got.x.std() == pytest.approx(1)


def test_neither_images_nor_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="nor is scikit-learn, whose digits would do"):
        training.main([])


def test_the_network_follows_from_its_seed():
    before = torch.get_rng_state()
    a, b, c = (resnet(10, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["conv1.weight"], c["conv1.weight"])


@pytest.mark.parametrize("size", [(1, 28, 28), (3, 32, 32), (1, 8, 8)])
def test_the_network_takes_small_images_and_can_be_traced(size):
    network = resnet(7, seed=0, channels=size[0], widths=(4, 6), blocks=2)
    x = torch.randn(5, *size)
    y = network(x)
    assert y.shape == (5, 7)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), y)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Digits, on one thread."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")
    threads = torch.get_num_threads(), sbn.get_num_threads()
    torch.set_num_threads(1)
    sbn.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads[0])
    sbn.set_num_threads(threads[1])


TINY = ["--epochs", "1", "--images", "48", "--batch", "16", "--threads", "1"]


@pytest.mark.parametrize("extra", [[], ["--no-fuse", "--sampler", "bs/8", "--channels-last"]])
def test_a_tiny_training(small, capsys, extra):
    training.main([*TINY, *extra, "--out", str(small)])
    printed = capsys.readouterr()
    assert "scikit-learn's digits instead" in printed.err and "epoch 1 of 1" in printed.err
    name = "sampled bs/8" if extra else "sampled fs/16, fused"
    lines = printed.out.splitlines()
    assert lines[-4] == "| normalization | test accuracy | time per step, ms | PyTorch / this | kept, MB |"
    assert lines[-2].startswith("| nn.BatchNorm2d | ") and " | 1.00 | " in lines[-2]
    kept = [float(line.split("|")[-2]) for line in lines[-2:]]
    assert 0.9 * kept[0] < kept[1] < 1.1 * kept[0]
    assert lines[-1].startswith(f"| {name} | ")
    layout = "channels-last" if extra else "channels-first"
    assert "digits, 48 images of 8×8, 1 epochs of batches of 16, SGD at rate 0.05" in lines[0]
    assert "1 threads used" in lines[0] and f"seed 0, cpu, {layout}. `python -m bench training" in lines[0]
    assert (small / "training.md").read_text(encoding="utf-8").endswith(printed.out)
    with (small / "training.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["normalization"] for row in rows] == ["nn.BatchNorm2d", name]
    for row in rows:
        assert row["steps"] == "3" and row["images"] == "48" and row["cpu"] and row["date"]
        assert 0 < float(row["step_p20"]) <= float(row["step_median"]) <= float(row["step_p80"])


def test_nothing_is_written_without_a_folder(small, monkeypatch):
    monkeypatch.chdir(small)
    training.main(TINY)
    assert not list(small.iterdir())


@pytest.mark.parametrize("fuse", [False, True])
def test_every_layer_is_converted_and_a_step_is_replayed(small, fuse):
    network = resnet(10, seed=0, widths=(4, 8), blocks=1)
    settings = training.Settings(epochs=1, batch=16)
    few = data.load().first(32)
    networks = {
        str(k): training.converted(network, training.SAMPLERS["fs/16"], 0, fuse) for k in range(2)
    } | {"full": training.converted(network, training.SAMPLERS["full"], 0, fuse)}
    plain = [m for m in networks["0"].modules() if type(m) is torch.nn.BatchNorm2d]
    assert not plain and any(type(m) is torch.nn.BatchNorm2d for m in network.modules())
    first, again, full = training.train(networks, few, settings)
    assert first.epochs[0].loss == again.epochs[0].loss != full.epochs[0].loss
    assert first.epochs[0].accuracy == again.epochs[0].accuracy


def test_full_sampling_learns_as_pytorch_does(small):
    network = resnet(10, seed=0, widths=(4, 8), blocks=1)
    full = training.converted(network, training.SAMPLERS["full"], 0, True)
    few, settings = data.load().first(64), training.Settings(epochs=2, batch=16)
    ours, theirs = training.train({"ours": full, "theirs": network}, few, settings)
    for a, b in zip(ours.epochs, theirs.epochs, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3) and len(a.seconds) == 4


def test_a_wrong_result_aborts(small, monkeypatch):
    right = training.converted

    def wrong(network, *given):
        network = right(network, *given)
        with torch.no_grad():
            network.bn1.weight += 1e-2
        return network

    monkeypatch.setattr(training, "converted", wrong)
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("timed before it was right"))
    with pytest.raises(SystemExit, match=r"nothing is timed: .* by Full\(\), fused, is off by"):
        training.main([*TINY, "--out", str(small)])
    assert not list(small.iterdir())


@pytest.mark.parametrize(
    "wrong",
    ["--sampler fs/7", "--epochs 0", "--images -5", "--batch 1.5", "--seed x", "--threads 0", "--device tpu"],
)
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        training.main(wrong.split())
    name, value = wrong.split()
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and f"error: argument {name}: " in complaint and value in complaint


def test_too_few_images(small):
    with pytest.raises(SystemExit, match=r"--images: expected at most the 1297 of .* digits, got 1298"):
        training.main(["--images", "1298"])
    with pytest.raises(SystemExit, match="--batch: expected at most the 8 images there are, got 9"):
        training.main(["--images", "8", "--batch", "9"])


def test_without_pytorch_or_a_gpu(small, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="--device cuda: expected a CUDA device, PyTorch finds none"):
            training.main(["--device", "cuda"])
    monkeypatch.setattr(training, "torch", None)
    with pytest.raises(SystemExit, match="needs PyTorch, which is not installed: pip install torch"):
        training.main([])


def test_it_is_among_the_benchmarks():
    command = [sys.executable, "-m", "bench", "training", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--channels-last" in done.stdout


def test_the_speed_of_a_step_and_normalizations_share(tmp_path, monkeypatch, capsys):
    from bench import speed

    monkeypatch.setattr(speed, "IMAGE", (2, 8, 8))
    training.main(["--speed", "--rounds", "2", "--batch", "4", "--out", str(tmp_path)])
    text = (tmp_path / "training-speed.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in text
    with (tmp_path / "training-speed.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["normalization"] for row in rows] == [training.FULL_BN, *speed.SAMPLERS]
    for row in rows:
        assert 0 < float(row["share"]) < 1 and 0 < float(row["step_p20"]) <= float(row["step_p80"])


@pytest.mark.parametrize("wrong, complaint", [
    (["--speed", "--epochs", "1"], "--epochs is not for --speed"),
    (["--speed", "--no-fuse"], "--sampler, --no-fuse are not for --speed"),
    (["--rounds", "3"], "--rounds needs --speed"),
])  # fmt: skip
def test_what_the_speed_of_a_step_takes(wrong, complaint, capsys):
    with pytest.raises(SystemExit):
        training.main(wrong)
    assert complaint in capsys.readouterr().err
