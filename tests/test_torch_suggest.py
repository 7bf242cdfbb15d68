"""A sampler for every layer of a model, which stays as it was, and its way into the converter."""

import copy

import pytest

import sbncore as sbn

torch = pytest.importorskip("torch")

from sbncore.adapters.torch import convert_sampled_batchnorm, suggest_samplers  # noqa: E402

nn = torch.nn


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 12 * 12, 8), nn.BatchNorm1d(8),
    ).eval()  # fmt: skip


def test_every_layer_gets_one_and_the_model_stays(model):
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(32, 1, 16, 16)
    random = torch.get_rng_state()
    found = suggest_samplers(model, x, tolerance=0.2)
    assert list(found) == ["1", "5", "8"] and not model.training
    assert isinstance(found["8"], sbn.Full | sbn.BatchSampling)
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert found["1"] == sbn.suggest(model[0](x).detach(), tolerance=0.2)
    assert found == suggest_samplers(model, (x,), tolerance=0.2)


def test_the_converter_takes_what_is_suggested(model):
    x = torch.randn(32, 1, 16, 16)
    found = suggest_samplers(model, x, candidates=[sbn.NaiveSampling(1 / 2)], tolerance=0.2)
    del found["5"]
    sampled = convert_sampled_batchnorm(copy.deepcopy(model), found)
    assert [sampled[1].sampler, sampled[8].sampler] == [found["1"], found["8"]]
    assert type(sampled[5]) is nn.BatchNorm2d and (sampled[1].layer, sampled[8].layer) == (0, 1)
    assert suggest_samplers(sampled, x, tolerance=1e-9)["1"] == sbn.Full()


def test_what_is_refused(model):
    x = torch.randn(8, 1, 16, 16)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        suggest_samplers(3, x)
    with pytest.raises(ValueError, match="expected BatchNorm layers that a forward calls, found none"):
        suggest_samplers(nn.Flatten(), x)
    with pytest.raises(ValueError, match="tolerance: expected a positive number"):
        suggest_samplers(model, x, tolerance=-1)
    with pytest.raises(ValueError, match=r"sampler: expected names of BatchNorm layers .*, got \['0', 'x'\]"):
        convert_sampled_batchnorm(model, {"x": sbn.Full(), "0": sbn.Full(), "1": sbn.Full()})
    with pytest.raises(TypeError, match="sampler"):
        convert_sampled_batchnorm(model, {"1": sbn.Full(), "5": 1 / 16})
    assert type(model[1]) is nn.BatchNorm2d
