"""Images to train on: IDX files as MNIST has them, CIFAR-10's, a folder of images, scikit-learn's digits."""

from __future__ import annotations

import gzip
import math
import pickle
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.options import BadData, expect

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts them
UNSIGNED_BYTE = 8
CIFAR10 = "data_batch_1.bin", "data_batch_1"
FOLDERS = ("train",)
RECORD = 1 + 3 * 32 * 32  # a label, then red, green, blue
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp"}
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # images, labels, the same to test with
DIGITS_TEST = 500


@dataclass(frozen=True)
class Images:
    """Images (N, C, H, W), of mean 0 and deviation 1 over all that there are to train on."""

    name: str
    x: np.ndarray
    labels: np.ndarray
    x_test: np.ndarray
    labels_test: np.ndarray
    classes: int

    def subset(self, count: int) -> Images:
        """Return the same with ``count`` images to train on: always these, of every class its share.

        Raises:
            BadData: if a class is too rare to be among them, or only in the test set.
        """
        known = np.unique(self.labels)
        strange = np.setdiff1d(self.labels_test, known)
        test = f"{self.name}: expected a test set of the {known.size} classes that there are to train on"
        expect(not strange.size, f"{test}, got images of {_listed(strange)} too")
        size = len(self.labels)
        order = np.random.default_rng(0).permutation(size)
        order = order[np.argsort(self.labels[order], kind="stable")]
        chosen = np.sort(order[(np.arange(count) * size + size // 2) // count])
        rare = np.setdiff1d(known, self.labels[chosen])
        share = f"--images: expected enough for a share of each of the {known.size} classes"
        expect(not rare.size, f"{share}, got {count} without {_listed(rare)}")
        return replace(self, x=self.x[chosen], labels=self.labels[chosen])


def _listed(classes: np.ndarray) -> str:
    return f"class {', '.join(map(str, classes))}"


def load(name: str | Path | None = None) -> Images:
    """Return the images of a folder, "digits", or Fashion-MNIST as Debian installs it, or else digits.

    A folder holds IDX files, CIFAR-10's files (binary or Python's), or folders train and test with a folder
    of images for each class.

    Raises:
        BadData: naming the file, what was expected and what came.
    """
    if name == "digits":
        return digits()
    if name is not None:
        folder = Path(name)
        came = "a file" if folder.exists() else "nothing there"
        expect(folder.is_dir(), f"{folder}: expected a folder of images, got {came}")
        for marker, reader in ((CIFAR10, from_cifar10), (FOLDERS, from_folders)):
            if any((folder / each).exists() for each in marker):
                return _data(folder.resolve().name, *reader(folder))
        return from_idx(folder, folder.resolve().name)
    if DEBIAN.is_dir():
        return from_idx(DEBIAN, "Fashion-MNIST")
    remedy = "Fashion-MNIST is not installed (apt install dataset-fashion-mnist, or --data FOLDER)"
    try:
        data = digits()
    except ImportError:
        raise BadData(f"{remedy}, nor is scikit-learn, whose digits would do") from None
    print(f"{remedy}: scikit-learn's digits instead", file=sys.stderr)
    return data


def digits() -> Images:
    """Return scikit-learn's 1,797 scans of 8x8, the last 500 of a fixed order to test with."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images.reshape(-1, 8, 8)[order], labels[order]
    train, test = slice(None, -DIGITS_TEST), slice(-DIGITS_TEST, None)
    return _data("scikit-learn's digits", images[train], labels[train], images[test], labels[test])


def from_idx(folder: Path, name: str) -> Images:
    """Return the four files of MNIST and its like, gzipped or plain."""
    arrays = []
    for part in ("train", "t10k"):
        paths = [_find(folder, f"{part}-{which}-ubyte") for which in ("images-idx3", "labels-idx1")]
        images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
        wanted = f"{len(images)} labels, as many as {paths[0].name} has images"
        expect(len(labels) == len(images), f"{paths[1]}: expected {wanted}, got {len(labels)}")
        arrays += [images, labels]
        train, here = ("×".join(map(str, each.shape[1:])) for each in (arrays[0], images))
        expect(train == here, f"{paths[0]}: expected images of {train}, as those to train on, got {here}")
    return _data(name, *arrays)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return an IDX file of bytes: 0, 0, the type, the number of dimensions, big-endian sizes, the values."""
    content = read(path)
    magic, header = bytes([0, 0, UNSIGNED_BYTE, dimensions]), 4 + 4 * dimensions
    kind = f"an IDX file of unsigned bytes in {dimensions} dimensions, which begins {magic.hex(' ')}"
    begin = content[:4].hex(" ") or "an empty file"
    expect(content[:4] == magic, f"{path}: expected {kind}, got {begin}")
    whole = len(content) >= header
    expect(whole, f"{path}: expected a header of {header} bytes, got {len(content)} bytes in all")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, 4))
    size, sizes = len(content) - header, " × ".join(map(str, shape))
    wanted = f"at least 1 value, and {sizes} of them as its header says"
    expect(math.prod(shape) == size > 0, f"{path}: expected {wanted}, got {size}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise BadData(f"{folder}: expected a file {stem} or {stem}.gz, got neither")


def _data(
    name: str, images: np.ndarray, labels: np.ndarray, images_test: np.ndarray, labels_test: np.ndarray
) -> Images:
    for each, many in ((images, labels), (images_test, labels_test)):
        right, counts = len(each) == len(many) > 0, f"{len(many)} for {len(each)}"
        expect(right, f"{name}: expected a label for each image, got {counts}")
    mean, deviation = images.mean(dtype=np.float64), images.std(dtype=np.float64)
    value = images.flat[0]
    expect(deviation > 0, f"{name}: expected images that differ, got the value {value} everywhere")

    def normalized(each: np.ndarray) -> np.ndarray:
        each = each[:, None] if each.ndim == 3 else each
        return (each.astype(np.float32) - np.float32(mean)) / np.float32(deviation)

    classes = 1 + int(max(labels.max(), labels_test.max()))
    train, test = labels.astype(np.int64), labels_test.astype(np.int64)
    return Images(name, normalized(images), train, normalized(images_test), test, classes)


def from_cifar10(folder: Path) -> Arrays:
    """Return CIFAR-10's binary or Python files (www.cs.toronto.edu/~kriz/cifar.html)."""
    binary = (folder / CIFAR10[0]).exists()
    batch, end = (_binary, ".bin") if binary else (_pickled, "")
    names = [f"data_batch_{k}{end}" for k in range(1, 6)]
    train = [batch(folder / name) for name in names if (folder / name).exists()]
    test = batch(folder / f"test_batch{end}")
    return *(np.concatenate(each) for each in zip(*train, strict=True)), *test  # type: ignore[return-value]


def _binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = read(path)
    whole = content and len(content) % RECORD == 0
    expect(whole, f"{path}: expected records of {RECORD} bytes, got {len(content)} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), _below_10(path, records[:, 0])


def _below_10(path: Path, labels: np.ndarray) -> np.ndarray:
    largest = labels.max(initial=0)
    expect(largest <= 9, f"{path}: expected labels of 0 to 9, got {largest}")
    return labels


class _Arrays(pickle.Unpickler):
    """Makes NumPy arrays and nothing else: a pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them for Python 2
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _pickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="bytes").load()
        images, labels = content[b"data"].reshape(-1, 3, 32, 32), np.array(content[b"labels"], np.uint8)
    except Exception as error:  # a garbled pickle may raise anything
        raise BadData(f"{path}: expected a batch of CIFAR-10 as Python pickles it, got {error}") from None
    counts = f"{len(labels)} for {len(images)}"
    expect(len(images) == len(labels), f"{path}: expected a label for each image, got {counts}")
    return images, _below_10(path, labels)


def from_folders(folder: Path) -> Arrays:
    """Return the images of train/CLASS/ and test/CLASS/, all of one size; needs matplotlib."""
    train, test = folder / "train", folder / "test"
    expect(train.is_dir(), f"{train}: expected a folder, got a file")
    classes = sorted(each.name for each in _shown(train) if each.is_dir())
    expect(classes, f"{train}: expected a folder for each class, got none")
    tested = {each.name for each in _shown(test) if each.is_dir()} if test.is_dir() else set()
    strange = ", ".join(sorted(tested - {*classes}))
    expect(not strange, f"{test}: expected the classes that there are to train on, got {strange} too")
    wanted = f"expected images ({', '.join(sorted(IMAGES))}), got none"
    arrays: list[np.ndarray] = []
    shape: tuple[int, ...] = ()
    for part in (train, test):
        images: list[np.ndarray] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            within = part / name
            expect(within.is_dir(), f"{within}: expected a folder, as there is for training, got none")
            paths = sorted(each for each in _shown(within) if each.suffix.lower() in IMAGES)
            expect(paths or part == test, f"{within}: {wanted}")
            for path in paths:
                image = _image(path)
                shape = shape or image.shape
                want, came = ("×".join(map(str, each)) for each in (shape, image.shape))
                same = f"{path}: expected an image of {want}, as the others, got {came}"
                expect(image.shape == shape, same)
                images.append(image)
                labels.append(label)
        expect(images, f"{part}: {wanted}")
        arrays += [np.stack(images), np.array(labels)]
    return tuple(arrays)  # type: ignore[return-value]


def _shown(folder: Path) -> list[Path]:
    return [each for each in folder.iterdir() if not each.name.startswith(".")]


def _image(path: Path) -> np.ndarray:
    """Return (C, H, W), 0 to 255."""
    from matplotlib.image import imread

    try:
        image = imread(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise BadData(f"{path}: expected an image, got {error}") from None
    cmyk = image.ndim == 3 and image.shape[2] == 4 and path.suffix.lower() in (".jpg", ".jpeg")
    came = "CMYK" if cmyk else image.shape
    expect(image.ndim in (2, 3) and not cmyk, f"{path}: expected a grey or RGB image, got {came}")
    scale = 255 if image.dtype.kind == "f" else 1  # PNGs come as 0 to 1
    image = image[..., None] if image.ndim == 2 else image[..., :3]
    return np.moveaxis(image, -1, 0).astype(np.float32) * scale


def read(path: Path) -> bytes:
    """Return a file's content, out of gzip if its name says so."""
    zipped = path.suffix == ".gz"
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if zipped else content
    except (OSError, EOFError, zlib.error) as error:
        wanted = "a gzip file" if zipped else "a file that can be read"
        raise BadData(f"{path}: expected {wanted}, got {error}") from None
