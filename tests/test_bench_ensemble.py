"""The networks that are trained together are `plain`; what is drawn is what the samples say."""

from pathlib import Path

import numpy as np
import pytest

if not (Path(__file__).parents[1] / "bench").is_dir():
    pytest.skip("no bench beside the tests", allow_module_level=True)
torch = pytest.importorskip("torch")

from bench import ensemble  # noqa: E402
from bench.data import Images  # noqa: E402
from bench.ensemble import BS, FS, SAMPLES, Ensemble, Sample  # noqa: E402
from bench.networks import WIDTHS, Plain  # noqa: E402


def images(count=300, size=16):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 3, size, size)).astype(np.float32)
    labels = np.arange(count) % 4
    x += labels[:, None, None, None] / 4
    return Images("noise", x, labels, x[:40], labels[:40], 4)


def of(copies=2):
    return Ensemble(images(), copies, epochs=1, rate=0.1, device="cpu")


def test_a_copy_is_the_plain_network():
    both, x = of(), torch.randn(6, 3, 16, 16)
    logits = both.network(x.repeat(1, 2, 1, 1), Sample(), [], 0.1)
    for copy in range(2):
        plain = Plain(3, 4, 2).train()
        state = plain.state_dict()
        norms = [name.removesuffix(".running_mean") for name in state if name.endswith("running_mean")]
        kernels = [name for name in state if name.startswith("features") and state[name].ndim == 4]
        for k, (kernel, C) in enumerate(zip(kernels, WIDTHS, strict=True)):
            state[kernel] = both.parameters[3 * k].detach().unflatten(0, (2, C))[copy]
        state["fc.weight"] = both.parameters[-3].detach().unflatten(0, (2, 4))[copy]
        state["fc.bias"] = both.parameters[-1].detach()[copy]
        plain.load_state_dict(state)
        torch.testing.assert_close(logits[:, copy], plain(x), rtol=1e-4, atol=1e-4)
        for (mean, var), norm in zip(both.running, norms, strict=True):
            state = plain.state_dict()
            torch.testing.assert_close(mean[copy], state[f"{norm}.running_mean"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(var[copy], state[f"{norm}.running_var"], rtol=1e-4, atol=1e-5)
        plain.eval()
        torch.testing.assert_close(
            both.network(x.repeat(1, 2, 1, 1), None, [])[:, copy], plain(x), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("sample", [FS(), FS(group=16), FS(even=True), FS(runs=1), FS(1 / 8, group=16)])
def test_positions_are_distinct_and_shared_by_a_group(sample):
    found = of().positions(sample, 128, 2, 32, 64)
    values = max(64 * sample.ratio, sample.at_least / 128)
    assert found.shape[:3] == (128, 2, 32) and values <= found.shape[3] <= values + sample.runs
    ordered = found.sort(3).values
    assert (ordered[..., 1:] > ordered[..., :-1]).all() and ordered.min() >= 0 and ordered.max() < 64
    assert (found[:, :, :16] == found[:, :, :1]).all()
    assert (found[:, :, 16] != found[:, :, 0]).any() == bool(sample.group)
    assert (found[:, 0] != found[:, 1]).any()


def test_moments_of_whole_samples_are_of_as_many_as_the_floor_asks_for():
    h = torch.randn(32, 2, 32, 8)
    mean, _, count = of().moments(h, BS(at_least=100))
    assert count == 13 * 8 and mean.shape == (2, 32)
    everything = of().moments(h, BS(at_least=1000))
    torch.testing.assert_close(everything[0], h.mean((0, 3)))


def test_a_quick_run_prints_a_table_and_more_copies_of_one_sample_do_not_differ(monkeypatch, capsys):
    monkeypatch.setattr(ensemble, "load", lambda folder: images())
    monkeypatch.setattr(ensemble, "SAMPLES", dict(list(SAMPLES.items())[:2]) | {"again": Sample()})
    ensemble.main(["--quick", "--images", "256", "--device", "cpu"])
    table = capsys.readouterr().out
    assert "2 copies of each" in table and "FS 1/16, the default" in table
    (again,) = [line for line in table.splitlines() if line.startswith("| again")]
    assert "+0.00 ± 0.00" in again and "+0.0000 ± 0.0000" in again
