"""The CUDA kernels, emulated with the launches of the real engine, against the reference."""

import contextlib
import itertools

import emulation
import numpy as np
import product
import pytest
import test_engine
from conftest import TOLERANCE, error
from hypothesis import given, settings
from hypothesis import strategies as st
from product import DTYPES, SAMPLERS, SHAPES
from strategies import cases

import sbncore as sbn
from sbncore import reference
from sbncore.cuda import call, geometry, record
from sbncore.statistics import unbiased

NAMES = {"float64": "double", "float32": "float", "float16": "float16", "bfloat16": "bfloat16"}


def emulator(*dtypes, **options):
    return emulation.EmulatedDevice([emulation.build((NAMES[dtype],)) for dtype in dtypes], **options)


def check(case, device):
    inputs = [a for a in (case.x, case.residual, case.weight, case.bias) if a is not None]
    before = [array.tobytes() for array in inputs]
    with emulation.emulated(device):
        test_engine.check(case)
    assert [array.tobytes() for array in inputs] == before


batches = st.one_of(st.integers(4, 9), st.sampled_from([32, 37, 64]))


@settings(max_examples=600)
@given(cases(batch=batches), st.sampled_from([1, 3, 16, 132]), st.integers(0, 2**32))
def test_emulated_kernels_are_the_references(case, multiprocessors, seed):
    check(case, emulator(case.dtype, multiprocessors=multiprocessors, seed=seed))


def run(device, *arguments, **options):
    """One forward and backward on the emulator, held against the reference."""
    with emulation.emulated(device):
        return product.run(*arguments, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_is_launched_and_right(rng, dtype):
    """The product of what can be asked for needs all instances that are compiled, and no others."""
    launched = set()
    quarter = sbn.FeatureSampling(1 / 4)
    some = [(SAMPLERS["full"], "exact")]
    some += itertools.product((SAMPLERS["random"], SAMPLERS["run"], quarter), ("exact", "sampled"))
    for shape, (sampler, gradient), last, relu, add in itertools.product(SHAPES, some, *[[False, True]] * 3):
        device = emulator(dtype, multiprocessors=1)
        run(device, rng, dtype, shape, sampler, last, relu, add, gradient)
        launched |= {name for name, _, _ in device.launches}
    assert launched == set(emulation.instances(types=(NAMES[dtype],)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_phases_and_the_callers_memory(rng, dtype, sampler):
    for (shape, last), relu, add in itertools.product(
        [((33, 8, 9), False), ((32, 8, 16), False), ((8, 4, 9), True)], *[[False, True]] * 2
    ):
        with emulation.emulated(emulator(dtype, multiprocessors=1)):
            product.run_in_phases(rng, dtype, shape, SAMPLERS[sampler], last, relu, add)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("sampler", ["full", "run"])
def test_the_gradient_behind_a_relu_is_written_without_a_residual(rng, sampler, last):
    """A double backward asks for it: g itself, which the residual's gradient is."""
    x, dy = rng.normal(size=(2, 33, 8, 7, 7))
    if last:
        x, dy = product.channels_last(x), product.channels_last(dy)
    plan = SAMPLERS[sampler].plan(x.shape)
    with emulation.emulated(emulator("float64")):
        y, saved = sbn.forward(x, plan=plan, activation="relu")
        saved.residual = True
        assert (sbn.backward(dy, saved, needs=["residual"]).residual == dy * (y > 0)).all()


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"twice"}))
def test_the_step_is_in_the_state(rng, name):
    """Backward finds the step that forward drew at, whatever became of the counter."""
    shape, step = (33, 8, 7, 7), np.array([5])
    x, dy = rng.normal(size=(2, *shape))
    with emulation.emulated(emulator("float64", multiprocessors=1)):
        whole = sbn.backward(dy, sbn.forward(x, plan=SAMPLERS[name].plan(shape, step=5))[1])
        _, saved = sbn.forward(x, plan=SAMPLERS[name].plan(shape, step=step))
        step += 1
        assert (sbn.backward(dy, saved).x == whole.x).all()
        assert saved.state.values[-1:].view(np.int64) == 5


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", [(36, 8, 7, 7), (12, 5, 24, 10), (6, 64), (100, 2, 80, 80)])
def test_the_places_are_the_plans_bit_for_bit(rng, sampler, shape):
    """The exact gradient differs from the detached one where p is not 0, and there alone."""
    device = emulator("float64", multiprocessors=1)
    plan = SAMPLERS[sampler].plan(shape, seed=1, layer=2**63, step=2**40)
    x, dy = rng.normal(size=(2, *shape))
    with emulation.emulated(device):
        _, saved = sbn.forward(x, plan=plan)
        exact, detached = (sbn.backward(dy, saved, gradient=g).x for g in ("exact", "detached"))
    drawn = np.broadcast_to(plan.weights()[:, None] > 0, shape)
    assert ((exact != detached) == drawn).all()


ODD = [(37, 8, 7, 7), (8, 6, 14, 14), (16, 5, 15, 15), (8, 16, 3, 3), (5, 8, 13, 9)]


@pytest.mark.parametrize("sampler", ["run", "runs", "patch", "grid", "samples", "scattered", "virtual"])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "float64"])
@pytest.mark.parametrize("shape", ODD)
def test_runs_that_begin_and_end_within_a_word(rng, dtype, shape, sampler):
    """Maps of odd sizes, runs across the ends of maps: right, and what is not drawn is not touched."""
    device = emulator(dtype, multiprocessors=2)
    for relu, add, gradient in ((False, False, "exact"), (True, False, "sampled"), (True, True, "exact")):
        if sampler != "virtual" or gradient != "sampled":
            run(device, rng, dtype, shape, SAMPLERS[sampler], False, relu, add, gradient)
    x, dy = rng.normal(size=(2, *shape)).astype(DTYPES[dtype])
    plan = SAMPLERS[sampler].plan(shape, step=3)
    with emulation.emulated(device):
        _, saved = sbn.forward(x, plan=plan)
        exact, detached = (sbn.backward(dy, saved, gradient=g).x for g in ("exact", "detached"))
    drawn = np.broadcast_to(plan.weights()[:, None] > 0, shape)
    assert (exact[~drawn] == detached[~drawn]).all() and (exact[drawn] != detached[drawn]).any()


@pytest.mark.parametrize("sampler", ["run", "random", "scattered", "virtual"])
def test_a_step_in_device_memory_is_read_by_the_kernels(rng, sampler):
    shape = (36, 8, 7, 7)
    x, dy = rng.normal(size=(2, *shape))
    step = np.array(5)
    plan = SAMPLERS[sampler].plan(shape, seed=3, step=step)
    for now in (5, 2**50):
        step[...] = now
        with emulation.emulated(emulator("float64")):
            y, saved = sbn.forward(x, plan=plan)
            step += 1  # what a training loop does before backward, or after it
            dx = sbn.backward(dy, saved).x
        with emulation.emulated(emulator("float64")):
            y_int, saved = sbn.forward(x, plan=SAMPLERS[sampler].plan(shape, seed=3, step=now))
            assert (y == y_int).all() and (dx == sbn.backward(dy, saved).x).all()


def test_parts_that_overlap_need_a_step_that_the_host_knows(rng):
    plan = SAMPLERS["twice"].plan((8, 2, 30), step=np.array(5))
    with emulation.emulated(emulator("float64")), pytest.raises(ValueError, match="share no samples"):
        sbn.forward(rng.normal(size=(8, 2, 30)), plan=plan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
def test_results_do_not_depend_on_the_order_of_threads(dtype, last):
    results = []
    for seed in range(3):
        device = emulator(dtype, seed=1000 * seed, multiprocessors=2)
        rng = np.random.default_rng(7)
        y, grads, _ = run(device, rng, dtype, (36, 8, 7, 7), SAMPLERS["run"], last, relu=True, add=True)
        results.append([np.asarray(a).tobytes() for a in (y, grads.x, grads.weight, grads.bias)])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("shape", [(70_000, 3, 2), (2, 70_000, 3), (70_000, 3), (1, 1, 70_000)])
@pytest.mark.parametrize("last", [False, True])
def test_more_rows_and_channels_than_65535(rng, shape, last):
    for sampler in (sbn.Full(), sbn.NaiveSampling(1 / 2)):
        run(emulator("float32", multiprocessors=8), rng, "float32", shape, sampler, last, relu=True, add=True)


def moved(shape, dtype, last, add, gradient="exact", sampler=sbn.FeatureSampling(1 / 16)):  # noqa: B008
    """Bytes read and written by forward and backward, over the tensor's own; and the narrow accesses."""
    rng = np.random.default_rng(1)
    device = emulator(dtype, multiprocessors=4)
    x, dy, residual = (rng.normal(size=shape).astype(DTYPES[dtype]) for _ in range(3))
    if last:
        x, dy, residual = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy, residual))
    traffic = []
    device.traffic()
    with emulation.emulated(device):
        plan = sampler.plan(x.shape, channel_axis=-1 if last else 1)
        _, saved = sbn.forward(
            x, plan=plan, channel_axis=-1 if last else 1, residual=residual if add else None,
            activation="relu" if add else None, gradient=gradient,
        )  # fmt: skip
        traffic.append(device.traffic())
        sbn.backward(dy, saved)
        traffic.append(device.traffic())
    return [(read / x.nbytes, written / x.nbytes, narrow / x.size) for read, written, _, narrow in traffic]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("C", "side"), [(32, 28), (64, 14)])
def test_each_kernel_moves_the_bytes_it_must_and_no_more(dtype, last, C, side):
    """2N and 3N and twice the sample, in accesses of 16 bytes but for a channels-first sample."""
    N = 96
    share = sbn.FeatureSampling(1 / 16).plan((N, C, side, side)).count / (N * side * side)
    bits = 1 / (8 * np.dtype(DTYPES[dtype]).itemsize)
    shape = (N, C, side, side)
    (read, written, narrow), (reread, rewritten, narrow_back) = moved(shape, dtype, last, False)
    sums = 0.05 if last else 0.03  # in channels-last every block adds up what the blocks before it have left
    assert read == pytest.approx(1 + share, abs=sums)
    assert written == pytest.approx(1, abs=0.02)
    assert reread == pytest.approx(2 + 2 * share, abs=0.06)
    assert rewritten == pytest.approx(1 + share, abs=0.02)
    for accesses in (narrow / share, narrow_back / (3 * share)):
        assert accesses < (0.35 if last else 1.2)
    (read, written, _), (reread, rewritten, _) = moved(shape, dtype, last, True)
    assert read == pytest.approx(2 + share, abs=sums)
    assert written == pytest.approx(1 + bits, abs=0.02)  # y and the mask
    # the repair reads a byte of the mask for each element
    assert reread == pytest.approx(2 + bits + (2 + 8 * bits) * share, abs=0.06)
    assert rewritten == pytest.approx(2 + share, abs=0.02)  # dx and dresidual


def test_full_and_sampled_gradients_move_what_they_must():
    shape = (64, 16, 14, 14)
    (read, _, _), (reread, rewritten, _) = moved(shape, "float32", False, False, sampler=sbn.Full())
    assert read == pytest.approx(2, abs=0.02) and reread == pytest.approx(4, abs=0.04)
    assert rewritten == pytest.approx(1, abs=0.02)
    _, (reread, rewritten, _) = moved(shape, "float32", True, False, "sampled")
    assert reread < 1.3 and rewritten < 1.1  # dy alone, and the sample twice


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("which", ["x", "residual", "dy", "out", "dx"])
def test_arrays_that_are_not_aligned_to_16_bytes(rng, dtype, which):
    kind, shape = DTYPES[dtype], (33, 8, 7, 7)

    def array(name, values=None):
        memory = np.zeros(33 * 8 * 49 + 1, kind)[1 if name == which else 0 :][: 33 * 8 * 49].reshape(shape)
        if values is not None:
            memory[...] = values
        return memory

    x, residual, dy = (rng.normal(size=shape) for _ in range(3))
    x, residual, dy = array("x", x), array("residual", residual), array("dy", dy)
    plan = SAMPLERS["run"].plan(shape)
    y_true, saved = reference.forward(
        x.astype(float), p=plan.weights(), activation="relu", residual=residual.astype(float)
    )
    dy[np.abs(saved.z) < 1e-3] = 0
    true = reference.backward(dy.astype(float), saved)
    with emulation.emulated(emulator(dtype)):
        y, kept = sbn.forward(x, plan=plan, activation="relu", residual=residual, out=array("out"))
        grads = sbn.backward(dy, kept, out=array("dx"))
    assert error(y, y_true) <= TOLERANCE[dtype] and error(grads.x, true["x"]) <= TOLERANCE[dtype]
    assert error(grads.residual, true["residual"]) <= TOLERANCE[dtype]


def test_batch_norm_moves_the_running_statistics_as_on_the_cpu(rng):
    x = rng.normal(2, 3, (32, 8, 7, 7)).astype(np.float32)
    x[0, 3] = np.inf
    sampler = sbn.Prior(0.25, sbn.FeatureSampling(1 / 4))
    running = [np.linspace(0, 1, 8).astype(np.float32), np.linspace(1, 2, 8).astype(np.float32)]
    expected, strided = [a.copy() for a in running], [np.repeat(a, 2)[::2] for a in running]
    for momentum, skip in ((0.1, True), (None, True), (1.0, False)):
        sbn.batch_norm(x, *expected, training=True, momentum=momentum, skip_nonfinite=skip, sampler=sampler)
        with emulation.emulated(emulator("float32")):
            for arrays in (running, strided):
                sbn.batch_norm(
                    x, *arrays, training=True, momentum=momentum, skip_nonfinite=skip, sampler=sampler
                )
            evaluated, _ = sbn.batch_norm(x, *running)
        finite = np.arange(8) != 3 if momentum == 1.0 else slice(None)
        for got, want in zip((*running, *strided), (*expected, *expected), strict=True):
            assert (np.isfinite(got) == np.isfinite(want)).all()
            np.testing.assert_allclose(got[finite], want[finite], rtol=1e-5)
        wanted, _ = sbn.batch_norm(x, *expected)
        np.testing.assert_allclose(evaluated[1:, finite], wanted[1:, finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_running_statistics_have_the_same_bits_as_on_the_cpu(rng, dtype):
    x = rng.normal(2, 3, (32, 8, 7, 7)).astype(dtype)
    for device in (contextlib.nullcontext(), emulation.emulated(emulator(dtype))):
        before = rng.uniform(0.5, 2, (2, 8)).astype(dtype)
        running = before.copy()
        with device:
            state = sbn.batch_norm(x, *running, training=True, momentum=0.1)[1].state
        mean, var, count = state.moments
        for old, new, got in zip(before, (mean, var * unbiased(count)), running, strict=True):
            wide = old.astype(np.float64)
            assert got.tobytes() == (wide + 0.1 * (new - wide)).astype(dtype).tobytes()


def test_moments_and_normalize_are_the_phases(rng):
    x = rng.normal(2, 3, (32, 8, 7, 7)).astype(np.float16)
    given = sbn.Statistics(np.zeros(8, np.float16), np.ones(8, np.float16))
    for sampler in (*SAMPLERS.values(), sbn.Prior(0.5), sbn.Prior(1.0)):
        plan = sampler.plan(x.shape)
        prior = given if plan.prior else None
        expected = sbn.moments(x, plan, prior=prior)
        with emulation.emulated(emulator("float16")):
            got = sbn.moments(x, plan, prior=prior)
            y = sbn.normalize(x, got, activation="relu")
        assert got.count == pytest.approx(expected.count)
        np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-5)
        np.testing.assert_allclose(got.var, expected.var, rtol=1e-5)
        assert error(y, sbn.normalize(x, expected, activation="relu")) <= TOLERANCE["float16"]


@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 3), (5, 3, 0), (5, 0, 4)])
def test_nothing_is_launched_on_an_empty_batch(shape):
    device = emulator("float32")
    x, C = np.zeros(shape, np.float32), shape[1]
    running = [np.zeros(C, np.float32), np.ones(C, np.float32)]
    with emulation.emulated(device):
        y, saved = sbn.batch_norm(x, *running, np.ones(C, np.float32), training=True)
        grads = sbn.backward(x, saved)
    assert y.shape == grads.x.shape == shape and (grads.weight == 0).all() and not device.launches
    assert (running[0] == 0).all() and (running[1] == 1).all()


@pytest.mark.parametrize("axis", [1, -1])
def test_what_holds_for_the_cpu_holds_here(rng, axis):
    """Far from zero, an outlier, a constant, what is not finite, every half: the CPU engine's own tests."""
    with emulation.emulated(emulator(*DTYPES, multiprocessors=2)):
        for sampler in (sbn.Full(), sbn.BatchSampling(4), sbn.FeatureSampling(1 / 16)):
            for far, tolerance in ((1e2, 2e-5), (1e4, 1e-3), (1e6, 1e-1)):
                test_engine.test_far_from_zero(rng, axis, sampler, far, tolerance)
        test_engine.test_what_is_not_finite_shows_and_passes_the_relu_like_torchs(rng)
        for dtype in ("float64", "float32"):
            test_engine.test_an_outlier_where_the_shift_is_taken_costs_no_accuracy(rng, dtype)
        for dtype in ("float16", "bfloat16"):
            test_engine.test_halves_are_rounded_to_nearest_even_with_all_their_values(dtype)
        constant = test_engine.test_a_constant_channel_gives_exactly_the_bias.hypothesis.inner_test
        for dtype, shape in itertools.product(DTYPES, [(5, 2), (4, 3, 7, 7), (33, 8, 11), (7, 1, 3)]):
            constant(dtype, 0.1, shape, axis == -1)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 70), st.data())
def test_a_run_lies_in_no_more_words_than_threads_read(width, size, data):
    align = data.draw(st.sampled_from([k for k in range(1, size + 1) if size % k == 0]))
    length = data.draw(st.integers(1, size))
    runs = geometry.Runs(1.0, geometry.MAP, 0, 1, 1, length, length, size, align, size // align, False)
    words = geometry.words_of(runs, width, size)
    for channel, start in itertools.product(range(width), range(0, size, align)):
        at = channel * size + (start + np.arange(length)) % size
        head = np.unique(at[at >= channel * size + start] // width)
        tail = np.unique(at[at < channel * size + start] // width)
        assert len(head) + len(tail) <= words


@given(
    st.integers(1, 2**20), st.integers(1, 2**20), st.integers(1, 2**16), st.booleans(),
    st.sampled_from([2, 4, 8]), st.integers(1, 200), st.sampled_from(sorted(SAMPLERS)),
)  # fmt: skip
@settings(max_examples=2000)
def test_every_geometry_is_within_the_kernels_limits(N, C, S, last, itemsize, multiprocessors, name):
    """Any sizes, beyond 2**31 elements and 65,535 rows or channels."""
    sizes = geometry.Sizes(N, C, S, last, itemsize, True)
    for sums in (False, True):
        sweep = geometry.sweep(sizes, multiprocessors, sums)
        assert sweep.tiles < 2**31 and sweep.blocks < 2**16
        assert (sweep.blocks - 1) * sweep.share * geometry.UNROLL < sweep.rows
        assert sweep.blocks * sweep.share * geometry.UNROLL >= sweep.rows
    V = sweep.vector
    assert sweep.rows * sweep.row == N * C * S and sweep.columns * V == sweep.row
    assert sweep.tile <= sweep.threads <= geometry.THREADS
    assert sweep.threads % sweep.tile == 0
    assert (sweep.tiles - 1) * sweep.tile < sweep.columns <= sweep.tiles * sweep.tile
    channels = sweep.tile * V if last else (sweep.tile * V - 2) // S + 2
    assert channels <= geometry.CHANNELS or sweep.tiles == 1
    assert last or V == 1 or S >= V
    try:
        parts = SAMPLERS[name].plan((N, C, S)).parts
    except ValueError:  # more than there is
        return
    runs = tuple(geometry.runs_of(part, S) for part in parts)
    places = geometry.places(sizes, runs, V, multiprocessors)
    assert places.tile * places.tiles * (places.vector if last else 1) >= C
    assert places.threads <= geometry.THREADS and places.tiles < 2**31 and places.blocks < 2**16
    assert places.tile * places.vector <= geometry.CHANNELS and V % places.vector == 0
    width = 1 if last else places.vector
    for run, (pieces, piece, lanes, _) in zip(runs, places.pieces, strict=True):
        words = geometry.words_of(run, width, S)
        assert (pieces - 1) * piece < words <= pieces * piece
        assert lanes <= places.threads // places.tile
        assert -(-run.length // width) <= words <= run.length
    assert len(geometry.fields(sizes, sweep, sweep, places)) == 13


def test_the_constants_are_those_of_the_kernels():
    source = emulation.device.source()
    for name, value in (
        ("THREADS", geometry.THREADS), ("UNROLL", geometry.UNROLL), ("CHANNELS", geometry.CHANNELS),
        ("ACCESSES", geometry.ACCESSES),
        ("FINISHED", geometry.FINISHED), ("PARTS", record.PARTS), ("SORTED", call.SORTED),
    ):  # fmt: skip
        assert f"{name} = {value}" in source
