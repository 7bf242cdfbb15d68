"""A layer for training code written in NumPy: parameters, running statistics and a step counter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import sbncore as sbn
from sbncore.checks import OPTIONS
from sbncore.drawing import integer
from sbncore.saved import digest

COUNTER = "num_batches_tracked"
STATE = "weight", "bias", "running_mean", "running_var", COUNTER


class SampledBatchNorm:
    """Sampled batch normalization as a layer with state, ``torch.nn.BatchNorm``'s in names and meaning.

    ``y = act(weight * (x - mean) * rstd + bias + residual)``, with the statistics that the sampler draws in
    training and the running ones in evaluation (the batch's own where none are tracked).

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats: as torch's; momentum None is the cumulative average.
        dtype: of parameters and statistics: float64 for float64 data, else float32.
        sampler, gradient, activation, channel_axis: as `sbncore.batch_norm`.
        seed, layer: name the draws; layers of one network should differ in ``layer``. The step is
            ``num_batches_tracked``.
        check: whether backward makes sure that x is as it was in forward: True compares a checksum of all its
            values; None looks at a few of them where x is large, at less than a hundredth of the time.

    Attributes:
        weight, bias: (C,) parameters, or None if not affine; dweight, dbias: their gradients from `backward`.
        running_mean, running_var: (C,), or None if not tracked.
        saved: what the last forward in training kept (`sbncore.Saved`).

    Every option may be set at any time, and is checked when it is.

    Raises:
        TypeError, ValueError: for options, when they are set. From forward what `sbncore.batch_norm` raises;
            the counter and the statistics have not moved then.
        ValueError: from backward, without a forward in training of its own, or if x was seen to have changed.
    """

    _xp: Any = np  # what makes the arrays

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        dtype: Any = "float32",
        *,
        sampler: sbn.Sampler = sbn.Full(),  # noqa: B008 - a frozen value
        gradient: str = "exact",
        activation: str | None = None,
        channel_axis: int = 1,
        seed: int = 0,
        layer: int = 0,
        check: bool | None = None,
    ) -> None:
        self.num_features = integer("num_features", num_features)
        if self.num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {num_features}")
        self.eps, self.momentum = eps, momentum
        self.sampler, self.gradient, self.activation = sampler, gradient, activation
        self.channel_axis, self.seed, self.layer, self.check = channel_axis, seed, layer, check
        self.weight = self._xp.ones(num_features, dtype) if affine else None
        self.bias = self._xp.zeros(num_features, dtype) if affine else None
        self.dweight: Any = None
        self.dbias: Any = None
        self.running_mean = self._xp.zeros(num_features, dtype) if track_running_stats else None
        self.running_var = self._xp.ones(num_features, dtype) if track_running_stats else None
        self.num_batches_tracked: Any = 0
        self.training = True
        self.saved: sbn.Saved | None = None
        self._pending = False  # whether backward may still use it
        self._digest: int | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        option = OPTIONS.get(name)
        super().__setattr__(name, value if option is None else option(value))

    def __repr__(self) -> str:
        line = f"{type(self).__name__}({self.num_features}, eps={self.eps}, momentum={self.momentum}"
        line += f", sampler={self.sampler}, layer={self.layer}"
        return f"{line}, activation={self.activation!r})" if self.activation else f"{line})"

    def train(self, mode: bool = True) -> SampledBatchNorm:
        """Normalize by what is drawn from now on, and return self."""
        self.training = mode
        return self

    def eval(self) -> SampledBatchNorm:
        """Normalize by the running statistics from now on, and return self."""
        return self.train(False)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the parameters, running statistics and counter, under torch's names.

        What is absent is left out; ``numpy.savez(file, **state)`` keeps it.
        """
        state = {name: getattr(self, name) for name in STATE}
        return {name: self._xp.array(value) for name, value in state.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`, of this layer's or torch's names, in place.

        Args:
            state: arrays (C,) of the layer's dtype, and an integer ``num_batches_tracked``; all that the
                layer has, and no more.

        Raises:
            ValueError, TypeError: naming what is missing, unknown or does not fit, before anything changes.
        """
        own = {name: getattr(self, name) for name in STATE}
        wanted = {name for name, value in own.items() if value is not None}
        if wanted != set(state):
            raise ValueError(f"state: expected {sorted(wanted)}, got {sorted(state)}")
        new = {name: self._xp.asarray(value) for name, value in state.items()}
        for name, value in new.items():
            like = self._xp.asarray(own[name]) if name != COUNTER else self._xp.zeros((), "int64")
            if value.shape != like.shape:
                raise ValueError(f"state: expected {name} of shape {like.shape}, got {value.shape}")
            if value.dtype != like.dtype:
                raise TypeError(f"state: expected {name} of {like.dtype}, got {value.dtype}")
        for name, value in new.items():
            if name == COUNTER and isinstance(self.num_batches_tracked, int):
                self.num_batches_tracked = int(value)
            else:
                own[name][...] = value

    def forward(self, x: Any, residual: Any = None) -> Any:
        """Return y; in training, move the running statistics and the counter once all is well.

        In evaluation nothing is kept: ``sbn.batch_norm`` and ``sbn.backward`` differentiate that.
        """
        self._pending = self._pending and not self.training  # a forward that is refused has no backward
        y, saved = sbn.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            self.momentum,
            self.eps,
            sampler=self.sampler,
            seed=self.seed,
            layer=self.layer,
            step=self.num_batches_tracked,
            channel_axis=self.channel_axis,
            activation=self.activation,
            residual=residual,
            gradient=self.gradient,
        )
        if self.training:
            self.num_batches_tracked += 1
            self.saved, self._pending = saved, True
            self._digest = digest(saved.x) if self.check else None
            if self.check is False:
                saved.probe = None
        return y

    __call__ = forward

    def backward(self, dy: Any) -> Any:
        """Return dx, or (dx, dresidual) where forward was given a residual; set dweight and dbias.

        It belongs to the last forward in training, once.
        """
        if self.saved is None or not self._pending:
            raise ValueError("backward: expected a forward before it, in training and its own, got none")
        if self._digest is not None and self._digest != digest(self.saved.x):
            raise ValueError("backward: expected x as it was in forward, got one that has changed since")
        grads = sbn.backward(dy, self.saved)
        self.dweight, self.dbias, self._pending = grads.weight, grads.bias, False
        return (grads.x, grads.residual) if self.saved.residual else grads.x
