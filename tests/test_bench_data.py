"""The training benchmark reads the images it should, and refuses files that are not what they should be."""

import gzip
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("no bench beside the tests", allow_module_level=True)

from bench import data  # noqa: E402

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


def made(labels, labels_test):
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(len(each), 1, 2, 2)) for each in (labels, labels_test)]
    return data.Images("made", images[0], np.asarray(labels), images[1], np.asarray(labels_test), 10)


@pytest.mark.parametrize("sorted_by", ["class", "nothing"])
def test_a_subset_holds_every_class_in_its_share(sorted_by, rng):
    labels = np.repeat(np.arange(10), [500, 500, 400, 400, 300, 300, 200, 200, 100, 100])
    labels = labels if sorted_by == "class" else rng.permutation(labels)
    whole = made(labels, np.arange(10))
    for count in (30, 160, 999, 3000):
        part = whole.subset(count)
        share = np.bincount(labels) * count / 3000
        assert len(part.x) == len(part.labels) == count and len(part.x_test) == 10
        assert (np.abs(np.bincount(part.labels, minlength=10) - share) <= 1).all()
        rows = [np.flatnonzero((whole.x == x).all((1, 2, 3))) for x in part.x]
        assert len({int(row[0]) for row in rows}) == count  # each once
        assert (labels[np.concatenate(rows)] == part.labels).all()
        assert (whole.subset(count).x == part.x).all()
    assert (whole.subset(3000).x == whole.x).all()


def test_classes_that_are_not_trained_on_are_refused(tmp_path, arrays):
    put(tmp_path, arrays)
    with pytest.raises(data.BadData, match=r"of the 3 classes .* got images of class 3 too"):
        data.load(tmp_path).subset(12)
    rare = made([0] * 99 + [7], [0, 7])
    with pytest.raises(data.BadData, match=r"--images: .* each of the 2 classes, got 4 without class 7"):
        rare.subset(4)
    assert set(rare.subset(100).labels) == {0, 7}


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
    with pytest.raises(data.BadData, match="expected a folder of images, got nothing there"):
        data.load(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(data.BadData, match="expected a folder of images, got a file"):
        data.load(str(tmp_path / "file"))


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
    with pytest.raises(data.BadData, match="nor is scikit-learn, whose digits would do"):
        data.load()


RECORDS = np.random.default_rng(0).integers(0, 256, (7, 3073)).astype(np.uint8)
RECORDS[:, 0] %= 10


@pytest.mark.parametrize("binary", [True, False])
def test_cifar10_is_read(tmp_path, binary):
    files = {"data_batch_1": RECORDS[:3], "data_batch_2": RECORDS[3:5], "test_batch": RECORDS[5:]}
    for name, rows in files.items():
        if binary:
            (tmp_path / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            batch = {b"data": rows[:, 1:], b"labels": rows[:, 0].tolist()}
            (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    got = data.load(tmp_path)
    assert got.x.shape == (5, 3, 32, 32) and got.x_test.shape == (2, 3, 32, 32)
    np.testing.assert_array_equal(got.labels, RECORDS[:5, 0])
    wanted = RECORDS[:5, 1:].reshape(-1, 3, 32, 32).astype(float)
    np.testing.assert_allclose(got.x, (wanted - wanted.mean()) / wanted.std(), atol=1e-5)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps({b"data": Evil()}), pickle.dumps([1])])
def test_a_pickle_that_is_no_batch(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(data.BadData, match="data_batch_1: expected a batch of CIFAR-10 as Python pickles it"):
        data.load(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_cifar10_cut_off_or_missing(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(RECORDS[:2].tobytes())
    with pytest.raises(data.BadData, match=r"test_batch.bin: expected a file that can be read"):
        data.load(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(RECORDS.tobytes()[:-1])
    with pytest.raises(data.BadData, match="expected records of 3073 bytes, got 21510 bytes"):
        data.load(tmp_path)


def test_cifar10_of_labels_that_are_none(tmp_path):
    odd = RECORDS.copy()
    odd[1, 0] = 255
    (tmp_path / "data_batch_1.bin").write_bytes(odd.tobytes())
    with pytest.raises(data.BadData, match=r"data_batch_1\.bin: expected labels of 0 to 9, got 255"):
        data.load(tmp_path)
    (tmp_path / "data_batch_1.bin").unlink()
    for labels, message in (([3, 10], "labels of 0 to 9, got 10"), ([3], "a label for each image, got 1")):
        batch = {b"data": RECORDS[:2, 1:], b"labels": labels}
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=2))
        with pytest.raises(data.BadData, match=f"data_batch_1: expected {message}"):
            data.load(tmp_path)


@pytest.fixture
def folders(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    for part, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = np.full((6, 5, 3), 40 * label + 10 * k + 3, np.uint8)
                image.imsave(tmp_path / part / name / f"{k}.png", pixels)
    return tmp_path


def test_folders_of_images_are_read(folders):
    got = data.load(folders)
    assert got.x.shape == (6, 3, 6, 5) and got.labels.tolist() == [0, 0, 0, 1, 1, 1] and got.classes == 2
    values = np.array([3, 13, 23, 43, 53, 63])
    np.testing.assert_allclose(got.x[:, 1, 2, 3], (values - values.mean()) / values.std(), atol=1e-5)
    wanted = (values[[0, 3]] - values.mean()) / values.std()
    np.testing.assert_allclose(got.x_test[:, 0, 0, 0], wanted, atol=1e-5)


def test_folders_that_are_not_what_they_should_be(folders):
    from matplotlib.image import imsave

    odd = folders / "train" / "cat" / "odd.png"
    imsave(odd, np.zeros((6, 6, 3), np.uint8))
    with pytest.raises(data.BadData, match=r"odd.png: expected an image of 3×6×5, as the others, got 3×6×6"):
        data.load(folders)
    odd.write_bytes(b"none")
    with pytest.raises(data.BadData, match=r"odd.png: expected an image, got"):
        data.load(folders)
    odd.unlink()
    (folders / "test" / "bird").mkdir()
    with pytest.raises(data.BadData, match=r"test: expected the classes that there .* got bird too"):
        data.load(folders)
    (folders / "test" / "bird").rmdir()
    for path in (folders / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(data.BadData, match=r"test: expected images .* got none"):
        data.load(folders)
    (folders / "test" / "dog").rmdir()
    with pytest.raises(data.BadData, match="dog: expected a folder, as there is for training, got none"):
        data.load(folders)


def test_hidden_files_empty_classes_and_a_file_named_train(folders):
    (folders / "train" / "cat" / "._0.png").write_bytes(b"of another system")
    (folders / "train" / ".thumbnails").mkdir()
    assert data.load(folders).classes == 2
    (folders / "train" / "eel").mkdir()
    (folders / "test" / "eel").mkdir()
    with pytest.raises(data.BadData, match=r"eel: expected images .* got none"):
        data.load(folders)
    alone = folders / "alone"
    alone.mkdir()
    (alone / "train").touch()
    with pytest.raises(data.BadData, match="train: expected a folder, got a file"):
        data.load(alone)


def test_a_print_in_cmyk_is_refused(folders):
    Image = pytest.importorskip("PIL.Image")
    Image.new("CMYK", (5, 6)).save(folders / "train" / "cat" / "print.jpg")
    with pytest.raises(data.BadData, match=r"print\.jpg: expected a grey or RGB image, got CMYK"):
        data.load(folders)
