"""Calls on the CPU: the record that a kernel reads, filled from addresses, and the threads that run it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from ctypes import addressof
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sbncore.arrays import STORAGE, address
from sbncore.cpu import draws, engine, kernels, threads, tuning
from sbncore.cpu.draws import Drawn
from sbncore.cpu.record import EVERYTHING, PRECOMPUTED, SAMPLE, Record
from sbncore.cpu.tuning import CACHE_LINE
from sbncore.plans import Draw, Plan, Runs
from sbncore.signature import ROWS, Pointers, Scalars, Signature, step_at

KEPT_RUNS = 64  # draws of a Call whose runs are kept for backward: layers of one signature in a network
KEPT_PLACES = 8  # the same, where a draw is spelled out place by place
NOWHERE = Drawn.of(Runs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)))
CLAIMS = Record.claims.offset
_ADDRESSES = struct.Struct("<23q")  # from Record.x on
_CONSTANTS = struct.Struct("<4d")  # from Record.prior on


class Prepared(NamedTuple):
    """A kernel, the record that its calls begin with, and bytes of ``partial`` and of a thread's memory."""

    kernel: kernels.Function
    template: bytes
    partial: int
    scratch: int


class Call:
    """Forward and backward of one signature; see `sbncore.call`."""

    memory = 0
    prior_element = sums_element = "float64"

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        layout, element, _, recipe, relu, residual = signature
        self.division = engine.of(layout)
        self.storage, self.recipe = STORAGE[element], recipe
        self.channels, self.elements = layout.C, layout.N * layout.C * layout.S
        self.mask = engine.mask_size(layout) if relu and residual else 0
        self.share = 1 / (1 - recipe.prior) if recipe.prior < 1 else 0.0  # of the sample in the statistics
        compiled = draws.takes(recipe)
        find = self._find(draws.drawing(recipe) if compiled else None)
        self.runs = lru_cache(maxsize=KEPT_RUNS if compiled else KEPT_PLACES)(find)
        self._forward = lru_cache(maxsize=256)(self._prepare_forward)
        self._backward = lru_cache(maxsize=256)(self._prepare_backward)

    def _find(self, compiled: Callable[[Draw], Drawn] | None) -> Callable[[Draw | None], Drawn]:
        def find(draw: Draw | None) -> Drawn:
            if draw is not None and compiled is not None and draws.fits(draw):
                return compiled(draw)
            return Drawn.of(Plan(self.recipe, draw).runs)

        return find

    def drawn(self, plan: Plan) -> tuple[Draw | None, None]:
        return plan.now().draw, None

    def forward(self, at: Pointers, draw: Draw | None, scalars: Scalars, stream: int | None = None) -> None:
        runs = self.runs(draw) if self.recipe.prior < 1 else NOWHERE
        prepared = self._forward(runs.number, at.y > 0, at.mask > 0)
        record = Record.from_buffer_copy(prepared.template)
        _CONSTANTS.pack_into(
            record, Record.prior.offset, self.recipe.prior, scalars.eps, scalars.momentum, scalars.unbiased
        )
        record.skip_nonfinite = scalars.skip_nonfinite
        if draw is not None:
            step_at(at.state + 8 * ROWS * self.channels).value = _signed(draw.step)
        self._run(prepared, record, at, runs)

    def backward(self, at: Pointers, draw: Draw | None, gradient: str, stream: int | None = None) -> None:
        runs, sums_over = NOWHERE, EVERYTHING
        if gradient != "detached" and self.recipe.parts:  # it flows through the statistics
            runs = self.runs(draw)
            sums_over = SAMPLE if gradient == "sampled" else EVERYTHING
        self._differentiate(at, runs, sums_over)

    def repair(self, at: Pointers, draw: Draw | None, stream: int | None = None) -> None:
        if self.recipe.parts:
            self._differentiate(at, self.runs(draw), PRECOMPUTED)

    def sums_to_repair_by(self, dweight: Any, dbias: Any, rows: Any) -> tuple[Any, Any]:
        return dbias, dweight

    def _differentiate(self, at: Pointers, runs: Drawn, sums_over: int) -> None:
        repairs, room = at.dx > 0, None
        if not repairs and at.dresidual:  # a kernel writes both or neither
            room = np.empty(self.elements, self.storage)
            at = at._replace(dx=address(room))
        drawn = runs.number
        prepared = self._backward(drawn, at.dx > 0, at.dresidual > 0, repairs and drawn > 0, sums_over)
        self._run(prepared, Record.from_buffer_copy(prepared.template), at, runs)

    def _prepare_forward(self, drawn: int, writes: bool, masked: bool) -> Prepared:
        _, _, _, recipe, relu, residual = self.signature
        division, full = self.division, recipe.full and drawn > 0
        nbytes = self.elements * self.storage.itemsize
        least = tuning.NONTEMPORAL_OUTPUT_FACTOR * engine.NONTEMPORAL_BYTES
        nontemporal = writes and division.whole and nbytes >= least
        kernel = kernels.kernel(
            division.memory, "forward", self.storage.char, relu, residual, masked, drawn > 0
        )
        choices = {
            "full": full,
            "multiplier": self.share if drawn else 0.0,
            "writes": writes,
            "nontemporal": nontemporal,
        }
        return self._prepared(kernel, drawn, full and division.cached, choices, EVERYTHING)

    def _prepare_backward(
        self, drawn: int, writes: bool, residual: bool, repairs: bool, sums_over: int
    ) -> Prepared:
        layout, division = self.signature.layout, self.division
        nontemporal = division.whole and self.elements * self.storage.itemsize >= engine.NONTEMPORAL_BYTES
        relu, masked = self.signature.relu, self.mask > 0
        kernel = kernels.kernel(division.memory, "backward", self.storage.char, relu, residual, masked, False)
        values = layout.N * layout.S / (1 - self.recipe.prior or 1)  # that the sums are estimated for
        multiplier = values if sums_over == SAMPLE else 0.0
        full = self.recipe.full and drawn > 0
        choices = {
            "full": full,
            "multiplier": multiplier,
            "writes": writes,
            "nontemporal": nontemporal,
            "repairs": repairs,
        }
        return self._prepared(kernel, drawn, sums_over != SAMPLE, choices, sums_over)

    def _prepared(
        self, kernel: kernels.Function, drawn: int, everything: bool, choices: dict[str, Any], sums_over: int
    ) -> Prepared:
        division = self.division
        record, scratch = Record.from_buffer_copy(division.template), division.scratch
        for name, value in choices.items():
            setattr(record, name, value)
        record.sums_over, record.mask_size = sums_over, self.mask
        record.runs, record.groups = drawn, division.groups(everything, drawn)
        if division.piece:
            record.capacity = drawn + self.elements // division.piece
            scratch += engine.multiple(24 * record.capacity, CACHE_LINE)
        record.scratch_size = scratch
        partial = engine.multiple(16 * record.groups * self.channels, CACHE_LINE)
        return Prepared(kernel, bytes(record), partial, scratch)

    def _run(self, prepared: Prepared, record: Record, at: Pointers, runs: Drawn) -> None:
        """Give the record its addresses and scratch memory, and run its kernel on it."""
        kernel, _, partial, scratch = prepared
        count = threads.count(self.division.tasks) if engine.parallel(self.elements) else 1
        total = partial + count * scratch
        room, here = np.empty(CACHE_LINE + total + 16 * self.channels, np.uint8), addressof(record)
        first = (address(room) + CACHE_LINE - 1) & -CACHE_LINE
        _ADDRESSES.pack_into(
            record,
            Record.x.offset,
            at.x,
            at.y,
            at.residual,
            at.mask,
            at.dy,
            at.dx,
            at.dresidual,
            at.state,
            at.weight,
            at.bias,
            at.running_mean,
            at.running_var,
            at.dweight,
            at.dbias,
            at.prior_mean,
            at.prior_var,
            runs.begin,
            runs.length,
            runs.share,
            at.sums or first + total,
            first,
            here + CLAIMS,
            first + partial,
        )
        threads.run(kernel, here, count)


def _signed(word: int) -> int:
    return (word + 2**63) % 2**64 - 2**63
