"""Hypothesis strategies named by what they draw: samplers, shapes, layouts, whole cases."""

import ctypes
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from product import DTYPES

import sbncore as sbn
from sbncore import reference


def runs_of(drawn):
    """Return begin, length and weight of the runs that compiled code has drawn, as `Plan.runs`."""
    kinds = (drawn.begin, ctypes.c_int64), (drawn.length, ctypes.c_int64), (drawn.share, ctypes.c_double)
    return [np.array((kind * drawn.number).from_address(begin)) for begin, kind in kinds]


def ratios():
    return st.sampled_from([1.0, 0.5, 0.25, 0.125, 1 / 16, 1 / 64])


def real_samplers():
    floors = st.sampled_from([4, 9, 40])
    return st.one_of(
        st.just(sbn.Full()),
        st.builds(sbn.BatchSampling, ratios(), st.sampled_from(sbn.BatchSampling.patterns), at_least=floors),
        st.builds(
            sbn.FeatureSampling,
            ratios(),
            st.sampled_from(sbn.FeatureSampling.patterns),
            st.sampled_from(["sample", "common"]),
            at_least=floors,
        ),
        st.builds(sbn.NaiveSampling, ratios(), at_least=floors),
    )


def samplers():
    """Every sampler, mixtures and priors included; for batches of 4 samples or more."""
    virtual = st.builds(sbn.VirtualSamples, st.sampled_from([2, 3]))
    pairs = st.one_of(st.tuples(real_samplers(), virtual), st.tuples(real_samplers(), real_samplers()))
    mixtures = st.builds(
        lambda w, pair: sbn.Mixture([(w, pair[0]), (1 - w, pair[1])]), st.sampled_from([0.5, 0.25]), pairs
    )
    plain = st.one_of(real_samplers(), virtual, mixtures)
    return st.one_of(plain, st.builds(sbn.Prior, st.sampled_from([0.1, 0.5, 1.0]), plain))


def shapes_NCS(batch):
    """(N, C, *spatial) with 0 to 3 spatial axes and sizes that are no multiple of anything."""
    side = st.integers(1, 9)
    spatial = st.one_of(
        st.just(()),
        st.tuples(st.sampled_from([1, 5, 64, 100, 2500])),
        st.tuples(side, side),
        st.sampled_from([(7, 7), (14, 14), (28, 28), (56, 56)]),
        st.tuples(st.integers(1, 4), st.integers(1, 4), side),
    )
    channels = st.sampled_from([1, 2, 3, 5, 16, 33, 300])
    return st.builds(lambda n, c, s: (n, c, *s), batch, channels, spatial).filter(
        lambda shape: np.prod(shape) <= 120_000
    )


@dataclass
class Case:
    """Arguments of one forward and backward, channels at axis 1, values in their dtype."""

    dtype: str
    x: np.ndarray
    weight: np.ndarray | None
    bias: np.ndarray | None
    residual: np.ndarray | None
    dy: np.ndarray
    plan: sbn.Plan
    prior: sbn.Statistics | None
    activation: str | None
    gradient: str
    layout: str

    def arrange(self, array):
        """Lay an array out in memory as the case's layout says; returns it and its channel axis."""
        if array is None:
            return None
        if self.layout == "first":
            return array
        last = np.ascontiguousarray(np.moveaxis(array, 1, -1))
        if self.layout == "last":  # a memory format: channels stay axis 1
            return np.moveaxis(last, -1, 1)
        if self.layout == "axis":  # channels are the last axis
            return last
        return np.flip(np.repeat(np.flip(array, 0), 2, axis=-1)[..., ::2], 0)  # odd, negative strides

    def arranged_back(self, array):
        return np.moveaxis(array, -1, 1) if self.layout == "axis" else array

    @property
    def channel_axis(self):
        return -1 if self.layout == "axis" else 1

    def forward(self):
        return sbn.forward(
            self.arrange(self.x),
            self.weight,
            self.bias,
            plan=self.plan,
            prior=self.prior,
            channel_axis=self.channel_axis,
            activation=self.activation,
            residual=self.arrange(self.residual),
            gradient=self.gradient,
        )

    def truth(self):
        """The reference's y, and gradients for a dy that is 0 where the sign of z is in the rounding."""
        f64 = lambda array: None if array is None else array.astype(np.float64)  # noqa: E731
        prior = None if self.prior is None else (self.plan.prior, self.prior.mean, self.prior.var)
        y, saved = reference.forward(
            f64(self.x),
            f64(self.weight),
            f64(self.bias),
            p=self.plan.weights(),
            prior=prior,
            activation=self.activation,
            residual=f64(self.residual),
        )
        if self.activation is not None:
            margin = 1e-9 if self.dtype == "float64" else 1e-3
            self.dy = np.where(np.abs(saved.z) < margin, np.zeros_like(self.dy), self.dy)
        return y, reference.backward(f64(self.dy), saved, self.gradient)


@st.composite
def cases(draw, dtypes=tuple(DTYPES), batch=st.integers(4, 9)):  # noqa: B008
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(shapes_NCS(batch))
    sampler = draw(samplers())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mean, std = draw(st.sampled_from([(0.0, 1.0), (3.0, 2.0), (-1.0, 0.1)]))
    kind = DTYPES[dtype]
    parameter = np.float64 if dtype == "float64" else np.float32
    C = shape[1]
    seed, step = int(rng.integers(2**40)), int(rng.integers(2**40))
    try:
        plan = sampler.plan(shape, seed=seed, step=step, layer=7)
    except ValueError as complaint:  # (N, C) batches of which one value is left
        assert "more than 1 value" in str(complaint)
        plan = sbn.Full().plan(shape)
    prior = None
    if plan.prior:
        prior = sbn.Statistics(
            rng.normal(mean, std, C).astype(parameter), rng.uniform(0.5, 2, C).astype(parameter) * std**2
        )
    gradients = ["exact", "detached"] if plan.virtual else ["exact", "sampled", "detached"]
    optional = lambda array: array if draw(st.booleans()) else None  # noqa: E731
    return Case(
        dtype,
        rng.normal(mean, std, shape).astype(kind),
        optional(rng.normal(1, 0.5, C).astype(parameter)),
        optional(rng.normal(0, 1, C).astype(parameter)),
        optional(rng.normal(0, 1, shape).astype(kind)),
        rng.normal(0, 1, shape).astype(kind),
        plan,
        prior,
        draw(st.sampled_from([None, "relu"])),
        draw(st.sampled_from(gradients)),
        draw(st.sampled_from(["first", "last", "axis", "odd"])),
    )
