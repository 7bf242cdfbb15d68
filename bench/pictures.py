"""Coloured images: CIFAR-10's own files, and folders with a folder of images for each class."""

from __future__ import annotations

import gzip
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from bench.options import BadData, expect

CIFAR10 = "data_batch_1.bin", "data_batch_1"
FOLDERS = ("train",)
RECORD = 1 + 3 * 32 * 32  # a label, then red, green, blue
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp"}
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # images, labels, the same to test with


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
    expect(
        not strange, f"{test}: expected the classes that there are to train on, got {strange} too"
    )
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
