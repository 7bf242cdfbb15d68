"""`check_gradients` finds what is wrong, names it, and is silent where nothing is."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sbncore as sbn
from sbncore.gradients import Discrepancy, GradientReport, check_gradients

Array = np.ndarray[Any, np.dtype[np.float64]]
NAMES = ("x", "weight", "bias")


def bn(x: Array, weight: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    """Full batch normalization of (N, C, *spatial), eps = 1e-12."""
    axes, shape = (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
    rstd = 1 / np.sqrt(x.var(axes, keepdims=True) + 1e-12)
    xhat = (x - x.mean(axes, keepdims=True)) * rstd
    return xhat * weight.reshape(shape) + bias.reshape(shape), (xhat, weight.reshape(shape) * rstd)


def bn_backward(dy: Array, saved: tuple[Array, ...]) -> list[Array]:
    xhat, scale = saved
    axes, share = (0, *range(2, dy.ndim)), dy.shape[1] / dy.size
    dbias, dweight = dy.sum(axes, keepdims=True), (dy * xhat).sum(axes, keepdims=True)
    dx = scale * (dy - share * (dbias + xhat * dweight))
    return [dx, dweight.ravel(), dbias.ravel()]


def bn_inputs(*shape: int, seed: int = 1, scale: float = 1.0, offset: float = 0.0) -> list[Array]:
    rng = np.random.default_rng(seed)
    x = scale * (rng.standard_normal(shape) + offset)
    return [x, 1 + rng.standard_normal(shape[1]) / 4, rng.standard_normal(shape[1])]


def tanh_chain(x: Array, v: Array, w: Array) -> tuple[Array, tuple[Array, ...]]:
    hidden = np.tanh(x @ v)
    y = np.tanh(hidden @ w)
    return y, (x, v, w, hidden, y)


def tanh_chain_backward(dy: Array, saved: tuple[Array, ...]) -> tuple[Array, ...]:
    x, v, w, hidden, y = saved
    dy = dy * (1 - y * y)
    dhidden = dy @ w.T * (1 - hidden * hidden)
    return dhidden @ v.T, x.T @ dhidden, hidden.T @ dy


def matmul(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return a @ b, (a, b)


def matmul_backward(dy: Array, saved: tuple[Array, Array]) -> tuple[Array, Array]:
    a, b = saved
    return dy @ b.T, a.T @ dy


def elementwise(f: Callable[[Array], Array], df: Callable[[Array], Array], x: Array) -> Any:
    """Check y = f(x), dx = dy·df(x)."""
    return check_gradients(lambda x: (f(x), x), lambda dy, x: [dy * df(x)], {"x": x})


def spoiled(spoil: Callable[[list[Array]], object]) -> Callable[..., list[Array]]:
    """bn_backward with its gradients changed in place by `spoil`."""

    def backward(dy: Array, saved: tuple[Array, ...]) -> list[Array]:
        grads = bn_backward(dy, saved)
        spoil(grads)
        return grads

    return backward


def scale_at(input: int, index: tuple[int, ...] | slice, factor: float = 1 + 1e-4) -> Any:
    def spoil(grads: list[Array]) -> None:
        grads[input][index] *= factor

    return spoil


# Correct gradients pass.


@pytest.mark.parametrize("offset", [0, 100, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5), (4, 3, 5, 5)], ids=str)
def test_correct_batch_norm_passes(shape: tuple[int, ...], scale: float, offset: float) -> None:
    inputs = bn_inputs(*shape, scale=scale, offset=offset)
    report = check_gradients(bn, bn_backward, inputs, names=NAMES)
    report.raise_if_failed()
    assert report and report.failed == 0 and report.worst.excess <= 1
    assert report.checks == 3 * 8 + inputs[0].size + 6
    assert [d.name for d in report.by_input] == [*NAMES]
    assert str(report).startswith(f"gradients agree in {report.checks} checks; the worst is ")


@pytest.mark.parametrize("offset", [1e6, 1e7, 1e8, 1e9, 1e10, 1e11])
@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
def test_correct_batch_norm_far_from_zero_passes(scale: float, offset: float) -> None:
    """The step took such data for a constant."""
    inputs = bn_inputs(4, 3, 5, scale=scale, offset=offset)
    check_gradients(bn, bn_backward, inputs, names=NAMES).raise_if_failed()
    if offset <= 1e8:  # where there are digits enough to tell
        report = check_gradients(bn, spoiled(scale_at(0, (3, 1, 2), 1.1)), inputs, names=NAMES)
        assert not report and report.worst.name == "x" and report.worst.index == (3, 1, 2)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
@pytest.mark.parametrize("seed", range(3))
def test_correct_products_and_chains_pass(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = (rng.standard_normal(s) for s in ((6, 30), (30, 5), (5, 4)))
    check_gradients(matmul, matmul_backward, [scale * a, b]).raise_if_failed()
    inputs = [scale * a, b / scale / 5, c]
    check_gradients(tanh_chain, tanh_chain_backward, inputs, seed=seed).raise_if_failed()


def test_large_correct_array_passes() -> None:
    inputs = bn_inputs(8, 4, 10, 10, offset=100)
    report = check_gradients(bn, bn_backward, inputs, names=NAMES)
    report.raise_if_failed()
    assert report.checks == 3 * 8 + 57 + 8  # 57 = ceil(sqrt(3200)) runs of x


def test_channels_of_very_different_scale_pass() -> None:
    x, weight, bias = bn_inputs(6, 3, 4, 4)
    x *= np.array([1e-3, 1, 1e3]).reshape(1, 3, 1, 1)
    check_gradients(bn, bn_backward, [x, weight, bias]).raise_if_failed()


def test_a_step_out_of_the_domain_is_made_smaller() -> None:
    x = 10 ** np.random.default_rng(0).uniform(-4, 4, 40)
    with np.errstate(all="raise"):
        elementwise(np.log, np.reciprocal, x).raise_if_failed()


def test_relu_away_from_its_kink_and_near_it_passes() -> None:
    x = np.random.default_rng(0).standard_normal(3000)
    x[:2] = 1e-5, -1e-5
    elementwise(lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0, x).raise_if_failed()


def test_gradients_that_are_zero_but_for_round_off_pass() -> None:
    """A bias before batch normalization changes nothing."""
    x, weight, bias = bn_inputs(6, 3, 4)

    def forward(x: Array, shift: Array) -> Any:
        return bn(x + shift.reshape(1, 3, 1), weight, bias)

    def backward(dy: Array, saved: tuple[Array, ...]) -> Any:
        dx = bn_backward(dy, saved)[0]
        return dx, dx.sum((0, 2))

    check_gradients(forward, backward, [x, np.zeros(3)]).raise_if_failed()
    check_gradients(lambda x: 0 * x, lambda dy: [0 * dy], [x]).raise_if_failed()


def test_scalars_and_outputs_of_another_shape() -> None:
    def backward(dy: Array, x: Array) -> Array:
        return 2 * x * dy

    report = check_gradients(lambda x: (np.sum(x * x), x), backward, {"x": np.ones((2, 3))})
    report.raise_if_failed()
    report = check_gradients(lambda x: (x * x, x), lambda dy, x: x * dy, {"x": np.array(3.0)})
    assert report.worst.index == () and str(report.worst).startswith("x: analytic ")


# Wrong gradients do not.


@pytest.mark.parametrize("input", range(3))
@pytest.mark.parametrize("offset", [0, 100])
def test_a_scaled_gradient_is_found(input: int, offset: float) -> None:
    for factor in (1 + 1e-4, 1 - 1e-4, -1, 0):
        backward = spoiled(scale_at(input, slice(None), factor))
        inputs = bn_inputs(4, 3, 5, offset=offset)
        report = check_gradients(bn, backward, inputs, names=NAMES)
        assert not report and report.worst.name == NAMES[input]
        assert report.worst.index is not None
        assert [d.name for d in report.by_input if d.excess > 1] == [NAMES[input]]
        # Directions and elements alike, but for elements that are almost 0.
        assert report.failed > 0.9 * (8 + inputs[input].size)


@given(data=st.data(), scale=st.sampled_from([1e-3, 1.0, 1e3]), size=st.integers(-4, 1))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_one_wrong_element_is_found_and_named(data: Any, scale: float, size: int) -> None:
    inputs = bn_inputs(4, 2, 3, scale=scale, offset=1, seed=data.draw(st.integers(0, 9)))
    which = data.draw(st.integers(0, 2))
    index = tuple(data.draw(st.integers(0, n - 1)) for n in inputs[which].shape)

    def spoil(grads: list[Array]) -> None:
        grads[which][index] += 10.0**size * np.abs(grads[which]).max()

    report = check_gradients(bn, spoiled(spoil), inputs, names=NAMES, directions=2)
    assert not report
    assert (report.worst.name, report.worst.index) == (NAMES[which], index)


@pytest.mark.parametrize("index", [(0, 0, 0, 0), (3, 1, 0, 2), (7, 3, 9, 9), (5, 2, 4, 7)])
def test_one_wrong_element_of_a_large_array_is_found_and_named(index: tuple[int, ...]) -> None:
    backward, inputs = spoiled(scale_at(0, index)), bn_inputs(8, 4, 10, 10)
    report = check_gradients(bn, backward, inputs, names=NAMES)
    assert not report
    assert (report.worst.name, report.worst.index) == ("x", index)
    assert report.worst.error == pytest.approx(1e-4, rel=1e-3)


def test_the_worst_of_two_wrong_elements_is_named() -> None:
    def spoil(grads: list[Array]) -> None:
        grads[0][1, 1, 1] += 1e-3
        grads[0][2, 2, 2] += 1e-2

    report = check_gradients(bn, spoiled(spoil), bn_inputs(4, 3, 5), names=NAMES)
    assert report.worst.index == (2, 2, 2)


def test_dropped_terms_are_found() -> None:
    def without_mean_term(dy: Array, saved: tuple[Array, ...]) -> list[Array]:
        dx, dweight, dbias = bn_backward(dy, saved)
        return [dx + saved[1] * dbias.reshape(1, -1, 1) * dy.shape[1] / dy.size, dweight, dbias]

    def detached(dy: Array, saved: tuple[Array, ...]) -> list[Array]:
        return [saved[1] * dy, *bn_backward(dy, saved)[1:]]

    for shape in ((4, 3, 5), (32, 8, 49)):  # element by element, and by runs
        for backward in (without_mean_term, detached):
            report = check_gradients(bn, backward, bn_inputs(*shape), names=NAMES)
            assert not report and report.worst.name == "x" and report.worst.index is not None


@pytest.mark.parametrize("shape", [(4, 3, 5), (8, 4, 10, 10)], ids=str)
def test_a_swapped_pair_is_found(shape: tuple[int, ...]) -> None:
    pair = [0, 1]  # neighbours, so in one run

    def spoil(grads: list[Array]) -> None:
        grads[0].flat[pair] = grads[0].flat[pair[::-1]]

    for seed in range(6):  # with entries of +-1 every second run would miss it
        inputs = bn_inputs(*shape)
        report = check_gradients(bn, spoiled(spoil), inputs, names=NAMES, directions=0, seed=seed)
        assert not report and report.worst.name == "x"
        assert np.ravel_multi_index(report.worst.index or (), shape) in pair

    report = check_gradients(bn, spoiled(lambda g: g.append(g.pop(1))), bn_inputs(*shape))
    assert {d.name for d in report.by_input if d.excess > 1} == {"inputs[1]", "inputs[2]"}


def test_directions_alone_find_a_scaled_gradient() -> None:
    backward = spoiled(scale_at(1, slice(None)))
    report = check_gradients(bn, backward, bn_inputs(4, 3, 5), names=NAMES, elementwise=0)
    assert report.checks == 24 and not report and report.worst.name == "weight"


def test_an_input_drawn_from_the_same_seed_is_not_the_cotangent() -> None:
    """Were dy = x, dx of batch normalization would vanish and hide its faults."""
    x = np.random.default_rng(0).standard_normal((4, 3, 5))
    seen = []

    def backward(dy: Array) -> Array:
        seen.append(dy)
        return dy

    check_gradients(lambda x: x, backward, [x], seed=0).raise_if_failed()
    assert abs(np.corrcoef(seen[0].ravel(), x.ravel())[0, 1]) < 0.5


# What the report says.


def test_the_report_prints_both_numbers() -> None:
    backward = spoiled(scale_at(0, (3, 1, 0, 2), 1.001))
    report = check_gradients(bn, backward, bn_inputs(4, 3, 2, 3), names=NAMES)
    worst = report.worst
    line = f"x[3, 1, 0, 2]: analytic {worst.analytic!r}, numerical {worst.numerical!r}"
    assert f"{line}, relative error 1.0e-03" == str(worst)
    assert str(report) == f"gradients differ in {report.failed} of 102 checks:\n  {worst}"
    with pytest.raises(AssertionError, match=r"x\[3, 1, 0, 2\]: analytic .*relative error 1.0e-03"):
        report.raise_if_failed()


def test_the_report_names_every_wrong_input_and_a_direction() -> None:
    backward = spoiled(lambda grads: [scale_at(i, slice(None))(grads) for i in (0, 2)])
    text = str(check_gradients(bn, backward, bn_inputs(4, 3, 5), names=NAMES))
    assert "\n  x[" in text and "\n  bias[" in text and "weight" not in text
    far = Discrepancy("x", None, 3, 1.0, 2.0, 0.5, 9.0)
    assert str(far) == "x along direction 3: analytic 1.0, numerical 2.0, relative error 5.0e-01"
    assert str(GradientReport(False, far, 5, 2, (far,))).startswith("gradients differ in 2 of 5")


def test_kinks_and_noise_are_hinted_at_and_plain_errors_are_not() -> None:
    x = np.random.default_rng(0).standard_normal(20)
    x[7] = 0
    report = elementwise(lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0, x)
    assert report.worst.index == (7,)
    assert "a kink? the slopes on its two sides differ by" in str(report)

    report = elementwise(lambda x: np.sign(x), np.zeros_like, x)  # a jump
    assert report.worst.index == (7,) and "a kink or noise? smaller steps lead to" in str(report)

    rng = np.random.default_rng(0)
    report = elementwise(lambda x: np.sin(x) + 1e-7 * rng.standard_normal(20), np.cos, x)
    assert not report and "noise? smaller steps lead to" in str(report)
    assert abs(report.worst.analytic - report.worst.numerical) < 1e-2  # not the smallest step's

    for factor in (1.0001, 2, -1):
        report = elementwise(np.sin, lambda x, factor=factor: factor * np.cos(x), x)
        assert not report and not report.worst.hint
        report = elementwise(lambda x: x / 3, lambda x, factor=factor: factor / 3 + 0 * x, x)
        assert not report and not report.worst.hint


def test_the_report_is_a_function_of_the_arguments() -> None:
    inputs = bn_inputs(4, 3, 5)
    first, again, other = (check_gradients(bn, bn_backward, inputs, seed=s) for s in (0, 0, 1))
    assert first == again != other
    np.random.seed(5)  # the global generator has no say
    assert check_gradients(bn, bn_backward, inputs) == first


# Whose arrays are whose.


def test_inputs_are_unchanged_and_forward_may_use_them_as_scratch() -> None:
    inputs = bn_inputs(4, 3, 5)
    before = [x.copy() for x in inputs]
    for x in inputs:
        x.flags.writeable = False

    def forward(x: Array, weight: Array, bias: Array) -> Any:
        result = bn(x.copy(), weight.copy(), bias)
        for array in (x, weight, bias):
            array.fill(np.nan)
        return result

    def backward(dy: Array, saved: tuple[Array, ...]) -> list[Array]:
        grads = bn_backward(dy, saved)
        dy.fill(np.nan)
        return grads

    check_gradients(forward, backward, inputs).raise_if_failed()
    for x, old in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(x, old)


def test_forward_and_backward_may_return_the_same_buffers_every_time() -> None:
    inputs = bn_inputs(4, 3, 5)
    out, dx = np.empty((4, 3, 5)), np.empty((4, 3, 5))

    def forward(*args: Array) -> Any:
        out[...], saved = bn(*args)
        return out, saved

    def backward(dy: Array, saved: tuple[Array, ...]) -> list[Array]:
        dx[...], *rest = bn_backward(dy, saved)
        return [dx, *rest]

    check_gradients(forward, backward, inputs).raise_if_failed()
    report = check_gradients(forward, spoiled(scale_at(0, (1, 2, 3))), inputs)
    assert report.worst.index == (1, 2, 3)


def test_the_memory_layout_of_the_inputs_reaches_forward() -> None:
    x = np.moveaxis(np.random.default_rng(0).standard_normal((4, 5, 5, 3)), -1, 1)
    seen = set()

    def forward(x: Array, weight: Array, bias: Array) -> Any:
        seen.add(x.strides)
        return bn(x, weight, bias)

    backward = spoiled(scale_at(0, (3, 1, 0, 2)))
    report = check_gradients(forward, backward, [x, np.ones(3), np.zeros(3)])
    assert report.worst.index == (3, 1, 0, 2) and seen == {x.strides}


# The forms that arguments and results may take.


def test_gradients_in_every_form() -> None:
    inputs = bn_inputs(4, 3, 5)
    named = dict(zip(NAMES, inputs, strict=True))

    def as_mapping(dy: Array, saved: Any) -> Any:
        return dict(zip(("bias", "weight", "x"), bn_backward(dy, saved)[::-1], strict=True))

    def as_attributes(dy: Array, saved: Any) -> Any:
        return SimpleNamespace(residual=None, **as_mapping(dy, saved))

    def partly(dy: Array, saved: Any) -> Any:
        return [None, *bn_backward(dy, saved)[1:]]

    assert check_gradients(bn, bn_backward, inputs)
    assert check_gradients(bn, bn_backward, named)
    for backward in (as_mapping, as_attributes):
        report = check_gradients(bn, backward, inputs, names=NAMES)
        assert report and report == check_gradients(bn, backward, named)
    report = check_gradients(bn, partly, named)
    assert report and [d.name for d in report.by_input] == ["weight", "bias"]
    alone = check_gradients(lambda x: x * 3, lambda dy: 3 * dy, [inputs[0]])
    assert alone and alone.worst.name == "inputs[0]"


X = np.ones(3)
SINE: tuple[Any, Any, Any] = (lambda x: (np.sin(x), x), lambda dy, x: [dy * np.cos(x)], [X])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": -1}, "directions must be positive and finite, got -1"),
        ({"elementwise": -5}, "elementwise must be positive and finite, got -5"),
        ({"outputs": 0}, "outputs must be 1 or more, got 0"),
        ({"directions": 0, "elementwise": 0}, "directions and elementwise are both 0"),
        ({"rtol": 0}, "rtol must be positive and finite, got 0"),
        ({"rtol": float("nan")}, "rtol must be positive and finite, got nan"),
        ({"atol": -1e-9}, "atol must be positive and finite, got -1e-09"),
        ({"step": 0.0}, "step must be positive and finite, got 0.0"),
        ({"step": float("inf")}, "step must be positive and finite, got inf"),
        ({"names": ["x", "y"]}, r"1 inputs need a name each, got \['x', 'y'\]"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_gradients(*SINE, **options)


@pytest.mark.parametrize("option", ["directions", "elementwise", "seed", "outputs"])
@pytest.mark.parametrize("value", [2.5, 2.0, True, "2"])
def test_counts_are_integers(option: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{option}: expected an integer, got {value!r}"):
        check_gradients(*SINE, **{option: value})


def two_outputs(x: Array, w: Array) -> tuple[Array, ...]:
    return x * w, np.array(np.sum(np.sin(x)))


def two_gradients(dy1: Array, dy2: Array, saved: tuple[Array, Array]) -> list[Array]:
    x, w = saved
    return [dy1 * w + dy2 * np.cos(x), dy1 * x]


def test_several_outputs() -> None:
    inputs = [np.random.default_rng(k).standard_normal((3, 4)) for k in range(2)]
    options: dict[str, Any] = {"inputs": inputs, "names": ["x", "w"], "outputs": 2}

    def forward(x: Array, w: Array) -> tuple[Any, ...]:
        return *two_outputs(x, w), (x, w)

    assert check_gradients(forward, two_gradients, **options)

    def forgets_the_second(dy1: Array, dy2: Array, saved: tuple[Array, Array]) -> list[Array]:
        return two_gradients(dy1, 0 * dy2, saved)

    report = check_gradients(forward, forgets_the_second, **options)
    assert not report and report.worst.name == "x" and report.by_input[1].excess <= 1
    given = inputs[0], inputs[1]
    assert check_gradients(two_outputs, lambda dy1, dy2: two_gradients(dy1, dy2, given), **options)


def test_a_second_output_is_not_taken_for_saved() -> None:
    """It was, and a backward that forgets it passed."""
    x, w = np.random.default_rng(0).standard_normal((2, 3, 4))
    with pytest.raises(TypeError, match="two float64 arrays: pass outputs=2 if both are"):
        check_gradients(two_outputs, lambda dy, _: [dy * w, dy * x], [x, w])
    as_saved: list[Any] = [lambda x, y: x, lambda x, y: y, lambda x, y: (y * 2,), lambda x, y: x > 0]
    for saved in as_saved:

        def forward(x: Array, saved: Any = saved) -> tuple[Array, Any]:
            y = np.exp(x)
            return y, saved(x, y)

        assert check_gradients(forward, lambda dy, _: dy * np.exp(x), [x])
    assert check_gradients(lambda x: (x * x, 2 * x), lambda dy, slope: dy * slope, [x], outputs=1)


@pytest.mark.parametrize("outputs", [2, 3])
def test_as_many_outputs_as_there_are(outputs: int) -> None:
    with pytest.raises(TypeError, match=f"forward must return {outputs} outputs, .* got 1 values"):
        check_gradients(lambda x: x, lambda *dys: dys[0], [X], outputs=outputs)


@pytest.mark.parametrize(
    ("forward", "backward", "inputs", "error", "message"),
    [
        (None, None, [], ValueError, "inputs is empty"),
        (None, None, {}, ValueError, "inputs is empty"),
        (None, None, X, TypeError, "inputs must be a sequence or a mapping of arrays"),
        (None, None, {"w": X.astype("f2")}, TypeError, "w must be a float64 or float32 array, got float16"),
        (None, None, [X, X.astype(int)], TypeError, r"inputs\[1\] must .* got int64"),
        (None, None, {"w": None}, TypeError, r"w must .* got object \(NoneType\)"),
        (None, None, {"w": np.ones((0, 3))}, ValueError, "w is empty or not finite"),
        (None, None, {"w": X * np.nan}, ValueError, "w is empty or not finite"),
        (lambda x: x.astype("f4"), None, [X], TypeError, "forward's y must .* got float32"),
        (lambda x: (x, 1, 2), None, [X], TypeError, r"forward must return .* got 3 values"),
        (lambda x: x * np.inf, None, [X], ValueError, "forward's y is empty or not finite"),
        (lambda x: x[:0], None, [X], ValueError, "forward's y is empty or not finite"),
        (lambda x: x[x > 0.9995], lambda dy: dy, [X], ValueError, "forward's y has shape"),
        (lambda x: np.where(x == 1, 1, np.nan), lambda dy: dy, {"w": X}, ValueError, "close to w"),
        (None, lambda dy, x: [dy[:2]], {"w": X}, ValueError, r"w has shape \(2,\), w has \(3,\)"),
        (None, lambda dy, x: [dy * np.nan], {"w": X}, ValueError, "gradient of w is .* not finite"),
        (None, lambda dy, x: [dy.astype("f4")], {"w": X}, TypeError, "gradient of w must be a flo"),
        (None, lambda dy, x: [dy, dy], {"w": X}, ValueError, r"\['w'\], got 2 \(in list\)"),
        (None, lambda dy, x: {"v": dy}, {"w": X}, ValueError, r"got 0 \(in dict\), under the names \['v'\]"),
        (None, lambda dy, x: None, {"w": X}, ValueError, "backward returned None for every input"),
        (
            None,
            lambda dy, x: [None],
            {"w": X},
            ValueError,
            "backward returned None for every input",
        ),
    ],
)
def test_bad_arguments(
    forward: Any, backward: Any, inputs: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_gradients(forward or SINE[0], backward or SINE[1], inputs)


def arrays_of(framework: str, dtype: str, *shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(3)
    values = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    if framework == "numpy":
        return list(values)
    module = pytest.importorskip(framework)
    make = module.from_numpy if framework == "torch" else module.numpy.asarray
    return [make(each) for each in values]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_arrays_of_every_framework_are_handed_over_as_they_came(framework: str, dtype: str) -> None:
    if (framework, dtype) == ("jax", "float64"):
        pytest.skip("JAX has float64 where it is told to")
    x, weight, bias = arrays_of(framework, dtype, (6, 4, 5), (4,), (4,))
    plan = sbn.FeatureSampling(1 / 3).plan((6, 4, 5))

    def forward(*arrays: Any) -> Any:
        assert all(type(each) is type(x) and each.dtype == x.dtype for each in arrays)
        return sbn.forward(*arrays, plan=plan)

    def backward(dy: Any, saved: Any) -> Any:
        assert type(dy) is type(x) and dy.dtype == x.dtype
        return sbn.backward(dy, saved)

    def wrong(dy: Any, saved: Any) -> Any:
        return sbn.backward(dy, saved)._replace(weight=sbn.backward(dy, saved).weight * 1.02)

    inputs = {"x": x, "weight": weight, "bias": bias}
    report = sbn.check_gradients(forward, backward, inputs)
    assert report, str(report)
    report = sbn.check_gradients(forward, wrong, inputs)
    assert not report and report.worst.name == "weight" and report.worst.error == pytest.approx(0.02, rel=0.2)


def test_the_gradients_of_autograd_itself() -> None:
    torch = pytest.importorskip("torch")

    def forward(x: Any) -> Any:
        x = x.requires_grad_()
        return torch.tanh(x) ** 2, x

    def backward(dy: Any, x: Any) -> Any:
        return torch.autograd.grad(torch.tanh(x) ** 2, x, dy)

    assert sbn.check_gradients(forward, backward, [torch.linspace(-1, 2, 7, dtype=torch.float64)])
    assert sbn.check_gradients(forward, backward, [torch.linspace(-1, 2, 7)])


def test_results_of_a_lower_precision_than_the_inputs_are_refused() -> None:
    (x,) = arrays_of("torch", "float64", (3, 4))
    with pytest.raises(TypeError, match=r"forward's y must be a float64 array, got float32 \(Tensor\)"):
        sbn.check_gradients(lambda x: x.float(), lambda dy: dy, [x])
    with pytest.raises(TypeError, match=r"the gradient of .* must be a float64 array, got float32"):
        sbn.check_gradients(lambda x: 2 * x, lambda dy: 2 * dy.float(), [x])
    with pytest.raises(TypeError, match=r"must be a float64 or float32 array: .* got int64"):
        sbn.check_gradients(lambda x: x, lambda dy: dy, [x.long()])
