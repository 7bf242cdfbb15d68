"""A progress bar on the terminal, or a line now and then where there is none."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts steps to ``total`` under a changing label; writes to standard error."""

    def __init__(self, total: int, width: int = 30) -> None:
        self.total, self.width, self.done = total, width, 0
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def step(self, label: str) -> None:
        """Count one step."""
        self.done += 1
        now, every = time.monotonic(), 0.1 if self.terminal else 10.0
        if now - self.shown < every and self.done < self.total:
            return
        self.shown = now
        filled = self.width * self.done // self.total
        left = (now - self.start) * (self.total - self.done) / self.done
        text = f"[{'#' * filled}{'.' * (self.width - filled)}] {self.done / self.total:4.0%} {label}"
        text += f", {left:.0f} s left" if self.done < self.total else f", {now - self.start:.0f} s in all"
        last = self.done == self.total
        sys.stderr.write(f"\r{text:<78}" + ("\n" if last else "") if self.terminal else text + "\n")
        sys.stderr.flush()
