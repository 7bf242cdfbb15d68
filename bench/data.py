"""Images to train on: IDX files as MNIST has them, CIFAR-10's, a folder of images, scikit-learn's digits."""

from __future__ import annotations

import gzip
import math
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.pictures import CIFAR10, FOLDERS, from_cifar10, from_folders
from bench.problems import BadData

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts them
UNSIGNED_BYTE = 8
DIGITS_TEST = 500


@dataclass(frozen=True)
class Data:
    """Images (N, C, H, W), of mean 0 and deviation 1 over all that there are to train on."""

    name: str
    x: np.ndarray
    labels: np.ndarray
    x_test: np.ndarray
    labels_test: np.ndarray
    classes: int

    def subset(self, count: int) -> Data:
        """Return the same with ``count`` images to train on: always these, of every class its share.

        Raises:
            BadData: if a class is too rare to be among them, or only in the test set.
        """
        known = np.unique(self.labels)
        strange = np.setdiff1d(self.labels_test, known)
        if strange.size:
            raise BadData(
                f"{self.name}: expected a test set of the {known.size} classes that there are to train on, "
                f"got images of {_listed(strange)} too"
            )
        size = len(self.labels)
        order = np.random.default_rng(0).permutation(size)
        order = order[np.argsort(self.labels[order], kind="stable")]
        chosen = np.sort(order[(np.arange(count) * size + size // 2) // count])
        rare = np.setdiff1d(known, self.labels[chosen])
        if rare.size:
            raise BadData(
                f"--images: expected enough for a share of each of the {known.size} classes, got {count} "
                f"without {_listed(rare)}"
            )
        return replace(self, x=self.x[chosen], labels=self.labels[chosen])


def _listed(classes: np.ndarray) -> str:
    return f"class {', '.join(map(str, classes))}"


def load(name: str | Path | None = None) -> Data:
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
        if not folder.is_dir():
            came = "a file" if folder.exists() else "nothing there"
            raise BadData(f"{folder}: expected a folder of images, got {came}")
        for marker, read in ((CIFAR10, from_cifar10), (FOLDERS, from_folders)):
            if any((folder / each).exists() for each in marker):
                return _data(folder.resolve().name, *read(folder))
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


def digits() -> Data:
    """Return scikit-learn's 1,797 scans of 8x8, the last 500 of a fixed order to test with."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images.reshape(-1, 8, 8)[order], labels[order]
    train, test = slice(None, -DIGITS_TEST), slice(-DIGITS_TEST, None)
    return _data("scikit-learn's digits", images[train], labels[train], images[test], labels[test])


def from_idx(folder: Path, name: str) -> Data:
    """Return the four files of MNIST and its like, gzipped or plain."""
    arrays = []
    for part in ("train", "t10k"):
        images_path, labels_path = (
            _find(folder, f"{part}-{which}-ubyte") for which in ("images-idx3", "labels-idx1")
        )
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(labels) != len(images):
            raise BadData(
                f"{labels_path}: expected {len(images)} labels, as many as {images_path.name} has images, "
                f"got {len(labels)}"
            )
        arrays += [images, labels]
        if images.shape[1:] != arrays[0].shape[1:]:
            train, test = ("×".join(map(str, each.shape[1:])) for each in (arrays[0], images))
            raise BadData(f"{images_path}: expected images of {train}, as those to train on, got {test}")
    return _data(name, *arrays)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return an IDX file of bytes: 0, 0, the type, the number of dimensions, big-endian sizes, the values."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        wanted = "a gzip file" if path.suffix == ".gz" else "a file that can be read"
        raise BadData(f"{path}: expected {wanted}, got {error}") from None
    magic, header = bytes([0, 0, UNSIGNED_BYTE, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic:
        raise BadData(
            f"{path}: expected an IDX file of unsigned bytes in {dimensions} dimensions, which begins "
            f"{magic.hex(' ')}, got {content[:4].hex(' ') or 'an empty file'}"
        )
    if len(content) < header:
        raise BadData(f"{path}: expected a header of {header} bytes, got {len(content)} bytes in all")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, 4))
    if math.prod(shape) != len(content) - header or math.prod(shape) == 0:
        sizes = " × ".join(map(str, shape))
        raise BadData(
            f"{path}: expected at least 1 value, and {sizes} of them as its header says, "
            f"got {len(content) - header}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise BadData(f"{folder}: expected a file {stem} or {stem}.gz, got neither")


def _data(
    name: str, images: np.ndarray, labels: np.ndarray, images_test: np.ndarray, labels_test: np.ndarray
) -> Data:
    for each, many in ((images, labels), (images_test, labels_test)):
        if len(each) != len(many) or len(each) == 0:
            raise BadData(f"{name}: expected a label for each image, got {len(many)} for {len(each)}")
    mean, deviation = images.mean(dtype=np.float64), images.std(dtype=np.float64)
    if deviation == 0:
        raise BadData(f"{name}: expected images that differ, got the value {images.flat[0]} everywhere")

    def normalized(each: np.ndarray) -> np.ndarray:
        each = each[:, None] if each.ndim == 3 else each
        return (each.astype(np.float32) - np.float32(mean)) / np.float32(deviation)

    classes = 1 + int(max(labels.max(), labels_test.max()))
    train, test = labels.astype(np.int64), labels_test.astype(np.int64)
    return Data(name, normalized(images), train, normalized(images_test), test, classes)
