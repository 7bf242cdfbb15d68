"""The demonstration's network is differentiated rightly, and the demonstration runs."""

import numpy as np
import pytest
from tables import unpadded

import sbncore as sbn
from bench import demo
from bench.demo import Network, cross_entropy


@pytest.mark.parametrize("name", demo.SAMPLERS)
def test_the_networks_gradient(name):
    sampler = demo.SAMPLERS[name]
    network = Network(sampler, 1, (2, 3, 4), np.float64)
    parameters = network.parameters()
    x = np.random.default_rng(0).normal(size=(16, 4, 4, 1))

    def forward(*values):
        for (layer, each), value in zip(parameters, values, strict=True):
            setattr(layer, each, value)
        for norm in network.norms:
            norm.num_batches_tracked = 0  # the same draw each time
        return network.forward(x)

    def backward(dy):
        network.backward(dy)
        return [getattr(layer, "d" + each) for layer, each in parameters]

    values = [getattr(layer, each) for layer, each in parameters]
    # a step so small that hardly a ReLU is crossed
    tolerances = {"step": 1e-6, "rtol": 1e-4}
    report = sbn.check_gradients(forward, backward, values, directions=4, elementwise=0, **tolerances)
    assert report, str(report)


def test_cross_entropy_has_its_gradient():
    labels = np.array([0, 2, 1])
    logits = np.random.default_rng(0).normal(size=(3, 4))
    loss = lambda z: np.array([cross_entropy(z, labels)[0]])  # noqa: E731
    report = sbn.check_gradients(loss, lambda dy: dy * cross_entropy(logits, labels)[1], [logits])
    assert report, str(report)


def test_it_runs(tmp_path, capsys):
    pytest.importorskip("sklearn")
    demo.main(["--quick", "--out", str(tmp_path)])
    printed = unpadded(capsys.readouterr().out)
    for name in demo.SAMPLERS:
        assert f"| {name} |" in printed
    assert "learning curves: " in printed or "no matplotlib" in printed
