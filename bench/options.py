"""What the command line of several benchmarks takes, and what they complain of."""

from __future__ import annotations

import argparse
from pathlib import Path


class BadData(ValueError):
    """Files that are not what they should be."""


def expect(right: object, complaint: str) -> None:
    """Raise BadData, which says what was expected and what came, unless all is right."""
    if not right:
        raise BadData(complaint)


def parser(name: str, about: str | None, quick: str, out: Path | None = None) -> argparse.ArgumentParser:
    """Return a parser that knows --out and --quick."""
    as_written = argparse.RawDescriptionHelpFormatter
    one = argparse.ArgumentParser(f"python -m bench {name}", description=about, formatter_class=as_written)
    one.add_argument("--out", type=folder, default=out, metavar="FOLDER", help="for the results")
    one.add_argument("--quick", action="store_true", help=quick)
    return one


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
