"""Values of the command line that several benchmarks take, and what they complain of."""

from __future__ import annotations

import argparse
from pathlib import Path


class BadData(ValueError):
    """Files that are not what they should be."""


def expect(right: object, complaint: str) -> None:
    """Raise BadData, which says what was expected and what came, unless all is right."""
    if not right:
        raise BadData(complaint)


def integer(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return int(text)


def folder(text: str) -> Path:
    """Return a folder, which need not exist yet."""
    path = Path(text)
    existing = next(each for each in (path, *path.parents) if each.exists())
    if not existing.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {existing}")
    return path
