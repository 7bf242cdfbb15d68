"""A sampler for every layer of a model, which stays as it was, and its way into the converter."""

import copy
import json
import re
import sys

import pytest

import sbncore as sbn
from sbncore.__main__ import main

torch = pytest.importorskip("torch")

from sbncore.adapters.torch import (  # noqa: E402
    VirtualBatch,
    convert_sampled_batchnorm,
    suggest_samplers,
)

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
    assert type(sampled[5]) is nn.BatchNorm2d and (sampled[1].layer, sampled[8].layer) == (0, 2)
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


def test_virtual_samples_are_no_data():
    x = torch.randn(16, 2, 8, 8)
    converted = convert_sampled_batchnorm(nn.Sequential(nn.BatchNorm2d(2)), sbn.VirtualSamples(3))
    batch = nn.Sequential(VirtualBatch(converted, 3))
    with pytest.raises(ValueError, match="expected no VirtualBatch, got its '0'; judge what is inside"):
        suggest_samplers(batch, x)
    found = suggest_samplers(batch[0].model, x, tolerance=0.1)
    assert found == {"0": sbn.suggest(x, tolerance=0.1)}
    for mapping in (found, found["0"]):
        sampler = {"0.model.0": mapping["0"]} if isinstance(mapping, dict) else mapping
        with pytest.raises(ValueError, match=r"one with VirtualSamples\(3\) for 'model.0', which a Virtual"):
            convert_sampled_batchnorm(batch, sampler)
    assert converted[0].sampler == sbn.VirtualSamples(3)
    with pytest.raises(ValueError, match="candidates: expected samples of the batch, got virtual samples"):
        suggest_samplers(converted, x, candidates=[sbn.VirtualSamples(2)])


def test_a_compiled_model_is_judged_uncompiled(model):
    x = torch.randn(8, 1, 16, 16)
    found = suggest_samplers(torch.compile(model), x, tolerance=0.3, draws=2)
    assert list(found) == [f"_orig_mod.{name}" for name in ("1", "5", "8")]
    model.compile()
    assert list(suggest_samplers(model, x, tolerance=0.3, draws=2)) == ["1", "5", "8"]


class Twice(nn.Module):
    """Calls its layer with a constant input, by name, and then with the given one."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.norm(input=torch.ones_like(x) + 1e-3 * x), self.norm(self.relu(x))


def test_a_layer_called_twice_and_by_keyword():
    x = torch.randn(16, 3, 8, 8)
    before = x.clone()
    found = suggest_samplers(Twice(), x, tolerance=0.05)
    assert torch.equal(x, before)
    assert found == {"norm": sbn.suggest(x.relu(), tolerance=0.05)}
    assert found["norm"] != sbn.suggest(torch.ones_like(x) + 1e-3 * x, tolerance=0.05)


def test_layers_that_are_frozen_stay_so(model):
    model.train()[1].eval()
    seen = []
    model[5].register_forward_pre_hook(lambda layer, _: seen.append(layer.training))
    model[1].register_forward_pre_hook(lambda layer, _: seen.append(layer.training))
    suggest_samplers(model, torch.randn(8, 1, 16, 16), tolerance=0.3, draws=2)
    assert seen == [False, True]


def test_complaints_name_the_layer_and_what_cannot_be_copied(model):
    x = torch.randn(8, 1, 16, 16)
    with pytest.raises(ValueError, match="1: BatchSampling: expected a count of at most the 8 samples"):
        suggest_samplers(model, x, candidates=[sbn.BatchSampling(9)])
    model.lock = __import__("threading").Lock()
    with pytest.raises(TypeError, match=r"expected one that copy.deepcopy can copy, got: cannot pick"):
        suggest_samplers(model, x)


def test_it_prints_why():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )
    chosen = suggest_samplers(model, torch.randn(16, 3, 20, 20), tolerance=0.02)
    text = str(chosen)
    assert (
        "1: (16, 8, 18, 18), 72% of the bytes: " in text and "4: (16, 4, 16, 16), 28% of the bytes: " in text
    )
    for name, found in chosen.tried.items():
        assert found[-1].sampler == chosen[name] and found[-1].error <= 0.02
        assert all(one.error > 0.02 for one in found[:-1])
        if len(found) > 1:
            assert f"too far off: {found[-2].sampler}, error {found[-2].error:.3f}" in text


def test_what_was_tried_is_told_in_words_numbers_and_a_picture(model, tmp_path):
    found = suggest_samplers(model, torch.randn(32, 1, 16, 16), tolerance=0.05)
    told = json.loads(json.dumps(found.as_dict()))
    assert told.keys() == found.keys() and told["1"]["shape"] == [32, 4, 14, 14]
    assert told["1"]["sampler"] == str(found["1"]) == told["1"]["tried"][-1]["sampler"]
    errors = [one["error"] for one in told["5"]["tried"]]
    assert errors[-1] <= 0.05 < min(errors[:-1])
    assert all(one["passes"] == min(8, 5 + 4 * one["share"]) for one in told["5"]["tried"])
    passes = found.passes
    assert 5 < passes < 8 and f"all layers: {passes:.1f} passes" in str(found)
    pytest.importorskip("matplotlib")
    found.picture(tmp_path / "errors.svg")
    assert "<svg" in (tmp_path / "errors.svg").read_text()


SOURCE = """
import beside
import torch
from torch import nn

def bare():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

def both():
    return bare(), torch.randn(16, 3, 10, 10)
"""


def test_the_command_prints_what_is_found(tmp_path, capsys, monkeypatch):
    file = tmp_path / "model.py"
    file.write_text(SOURCE)
    (tmp_path / "beside.py").touch()  # as a script, it may import it
    monkeypatch.setattr(sys, "path", [*sys.path])
    main(["suggest", f"{file}:both", "--tolerance", "0.1"])
    assert "1: (16, 4, 8, 8), 100% of the bytes: " in capsys.readouterr().out
    main(["suggest", f"{file}:bare", "--input", "16,3,10,10", "--json"])
    told = capsys.readouterr()
    with pytest.raises(ValueError, match="tolerance"):
        main(["suggest", f"{file}:both", "--tolerance", "0", "--traceback"])
    assert json.loads(told.out)["1"]["shape"] == [16, 4, 8, 8] and "white noise" in told.err


@pytest.mark.parametrize("arguments, message", [
    (["nowhere.py:bare"], "model: expected FILE.py:FUNCTION, got 'nowhere.py:bare'"),
    (["{}:other"], "model: expected a function 'other' in "),
    (["{}:bare"], "--input: expected a shape, since the function returns no batch"),
    (["{}:both", "--tolerance", "0"], "tolerance: expected a positive number"),
])  # fmt: skip
def test_what_the_command_refuses(tmp_path, monkeypatch, arguments, message):
    file = tmp_path / "model.py"
    file.write_text(SOURCE)
    (tmp_path / "beside.py").touch()  # as a script, it may import it
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["suggest", *(argument.format(file) for argument in arguments)])
