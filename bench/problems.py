"""What a benchmark complains of."""

import argparse
from pathlib import Path


class BadData(ValueError):
    """Files that are not what they should be."""


def folder_option(text: str) -> Path:
    """Return an option's folder, which need not be there yet."""
    path = Path(text)
    for each in (path, *path.parents):
        if each.exists():
            if not each.is_dir():
                raise argparse.ArgumentTypeError(f"expected a folder, got the file {each}")
            break
    return path
