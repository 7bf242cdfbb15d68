"""The emulator bites: kernels without one of their barriers, or with an index shifted, fail its tests."""

import itertools
import re
import subprocess

import emulation
import numpy as np
import pytest
from product import SAMPLERS
from test_emulation import run

import sbncore as sbn
from sbncore.cuda import device

SOURCE = device.source()
BARRIERS = [
    (match.start(), match.end())
    for match in re.finditer(r"(?<!void )block_barrier\(\);", SOURCE)
    if match.start() > SOURCE.index("struct Hashes")
]
SHIFTED = [
    ("piece.n = part.first + group;", "piece.n = part.first + group + 1;"),
    ("part.stride * group;", "part.stride * group + 1;"),
    ("piece.s -= (int)call.S;", "piece.s -= (int)call.S - 1;"),
    ("first + i : i - heads", "first + i : i - heads + 1"),
    ("tail = before + piece.count - head;", "tail = before + piece.count - head - 1;"),
    ("(u32)(end - 1) / WIDTH - first + 1;", "(u32)end / WIDTH - first + 1;"),
    ("(u32)(tail - 1) / WIDTH + 1 : 0", "(u32)tail / WIDTH : 0"),
    ("from > 0 ? from : 0", "from > 1 ? from : 0"),
    ("to < WIDTH ? to :", "to < WIDTH ? to + 1 :"),
    ("round + group < to", "round + group <= to"),
    ("base = map - before;", "base = map;"),
    ("i + 1, Pack", "i, Pack"),
    ("(inside >> i & 3) == 3", "(inside >> i & 3) == 2"),
    ("(u32)part.pieces) * (int)part.piece;", "(u32)part.pieces) * ((int)part.piece - 1);"),
    ("piece.s = number * (int)part.stride;", "piece.s = number * (int)part.stride + 1;"),
    ("rest < piece.count ? rest", "rest < piece.count ? rest + 1"),
    ("bits / 2;", "bits / 2 + 1;"),
    ("rank += hashes.of[other] < mine", "rank += hashes.of[other] <= mine"),
    ("rank < part.groups", "rank < part.groups - 1"),
    ("call.rows - from * UNROLL : 0", "call.rows - from * UNROLL + 1 : 0"),
    ("column < call.columns && ty", "column <= call.columns && ty"),
    ("live -= TY * UNROLL;", "live -= TY * UNROLL - 1;"),
    ("from = share.block * quads + ty", "from = share.block * (quads - 1) + ty"),
    ("k + 1 == left", "k == left"),
    ("bits >> ((h + u) * V + i)", "bits >> ((h + u) * V + i + 1)"),
    ("bit = row % UNROLL * V", "bit = (row + 1) % UNROLL * V"),
    ("row * TX + column;", "row * TX + column + 1;"),
    ("unit -= width;", "unit -= width - 1;"),
    ("rows_on = helpers / width", "rows_on = helpers / width + 1"),
    ("(int)(to < most ? to : most)", "(int)(to < most ? to - 1 : most)"),
    ("rows; e += helpers)", "rows; e += helpers + 1)"),
    ("e < all; e += helpers)", "e < all; e += helpers + 1)"),
    ("(e - block * width)", "(e - block * width + 1)"),
    ("give(v / FINISHED, c)", "give(v / FINISHED + 1, c)"),
    ("(L == LAST ? 0 : share.tile)", "(L == LAST ? 0 : share.tile + 1)"),
    ("to * call.S + call.S - 1", "to * call.S + call.S"),
    ("divide(from * call.S,", "divide((from + 1) * call.S,"),
    ("[t + half];", "[t + half - 1];"),
    ("k * call.C + c, state[k]", "k * call.C + c + 1, state[k]"),
    ("? from + part.share : pieces", "? from + part.share - 1 : pieces"),
]


def battery(library):
    """Run what a fault must show itself in; raises where it does."""
    few = sbn.Mixture([(0.5, sbn.NaiveSampling(40)), (0.5, sbn.BatchSampling(8, "random"))])
    many = sbn.NaiveSampling(3000)
    options = [dict(relu=relu, add=add) for relu, add in itertools.product([False, True], repeat=2)]
    for seed in range(4):
        emulator = emulation.EmulatedDevice([library], seed=seed, multiprocessors=3)
        rng = np.random.default_rng(seed)
        for k, (shape, sampler) in enumerate(
            [
                ((33, 40, 7, 7), SAMPLERS["run"]), ((33, 2, 40, 40), SAMPLERS["patch"]),
                ((33, 2, 1028), SAMPLERS["full"]), ((35, 44, 7, 7), SAMPLERS["full"]),
                ((32, 8, 6, 6), SAMPLERS["strided"]), ((12, 4, 8), few), ((40, 2, 15, 15), many),
                ((9, 3, 7), SAMPLERS["run"]), ((5, 300, 3, 5), SAMPLERS["twice"]),
                ((64, 70), SAMPLERS["samples"]), ((33, 2, 1028), SAMPLERS["samples"]),
                ((33, 2, 1024), SAMPLERS["full"]), ((12, 3, 30), sbn.FeatureSampling(10, "runs")),
            ]
        ):  # fmt: skip
            for last in (False, True):
                run(emulator, rng, "float32", shape, sampler, last, **options[(k + seed) % 4], step=seed)
        run(emulator, rng, "float32", (33, 40, 7, 7), SAMPLERS["run"], False, True, True, "sampled")
    many_blocks = emulation.EmulatedDevice([library], multiprocessors=132)
    run(many_blocks, rng, "float32", (40, 1, 2000), sbn.NaiveSampling(1 / 2))


def library(source):
    text = source[source.index("// A call's arguments") :]
    return emulation.build(("float",), text, optimize=False)


def test_without_a_fault_nothing_is_found():
    battery(emulation.build(("float",)))


def caught(source):
    try:
        built = library(source)
    except subprocess.CalledProcessError as failure:
        pytest.fail(failure.stderr)
    with pytest.raises((AssertionError, RuntimeWarning)):  # of a NaN that nobody has written
        battery(built)


@pytest.mark.parametrize("k", range(len(BARRIERS)))
def test_a_barrier_that_is_left_out_is_missed(k):
    begin, end = BARRIERS[k]
    caught(SOURCE[:begin] + "/* no barrier */;" + SOURCE[end:])


@pytest.mark.parametrize(("right", "wrong"), SHIFTED)
def test_an_index_that_is_shifted_is_found(right, wrong):
    assert SOURCE.count(right) >= 1, "the kernels no longer contain this text"
    caught(SOURCE.replace(right, wrong))
