"""The batch that a VirtualBatch runs in this thread: its rows, and how many of the last ones are virtual."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Now(threading.local):
    def __init__(self) -> None:  # in each thread; defaults of the class would fail torch.compile's guards
        self.rows = self.virtual = 0


now = _Now()


@contextmanager
def running(rows: int, virtual: int) -> Iterator[None]:
    """Say, within, that a batch of so many rows has so many virtual ones."""
    before = now.rows, now.virtual
    now.rows, now.virtual = rows, virtual
    try:
        yield
    finally:
        now.rows, now.virtual = before
