"""The CPU's goals and the peers that PyTorch and JAX offer: right before they are timed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from tables import unpadded

if not (Path(__file__).parents[1] / "bench").is_dir():
    pytest.skip("no bench beside the tests", allow_module_level=True)

import sbncore as sbn
from bench import layer, peers, targets, timing
from bench.cases import Case, Data, verify


@pytest.fixture(autouse=True)
def _malloc_as_it_is(monkeypatch):
    monkeypatch.setattr(timing, "keep_pages", lambda: True)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "jax-sampled"])
def test_peers_are_right(name, layout):
    pytest.importorskip(peers.PEERS[name].needs)
    verify(peers.PEERS[name](Data(Case((6, 5, 4, 7), layout, "float32", True, True))))


def test_a_peer_that_copies_differentiates_what_the_check_has_left():
    pytest.importorskip("jax")
    one = peers.Jax(Data(Case((6, 5, 4, 7), "last", "float32", True)))
    one.forward()
    one.data.sets[0].dy[...] = 0
    one.backward()
    assert not any(np.asarray(each).any() for each in one.grads)


def test_what_is_timed_against_is_known_and_installed(capsys):
    for wanted, complaint in (
        ("torch,cuda", "expected some of numpy, torch, compile, jax, jax-sampled, copy, got 'cuda'"),
        ("jax", "--against jax needs the package jax, which is not installed"),
    ):
        if wanted == "jax" and importlib.util.find_spec("jax") is not None:
            continue
        with pytest.raises(SystemExit):
            layer.main(["--against", wanted])
        assert complaint in capsys.readouterr().err


def test_only_a_copy_will_do(tmp_path, capsys):
    layer.main(
        ["--against", "copy,numpy", "--shapes", "4x6x40", "--rounds", "1", "--samplers", "full", "--out",
         str(tmp_path)]
    )  # fmt: skip
    assert "| NumPy / ours |" in unpadded(capsys.readouterr().out)


def test_targets_are_measured_and_compared(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    monkeypatch.setattr(targets, "QUICK", [(4, 6, 5, 5)])
    monkeypatch.setattr(targets, "small", lambda: 15.0)
    targets.main(["--quick", "--rounds", "1", "--no-compile", "--out", str(tmp_path)])
    text = (tmp_path / "targets-cpu.md").read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    text = unpadded(text)
    for name in targets.GOALS:
        threads = name == "one thread / two" and sbn.get_num_threads() == 1
        assert (f"| {name} |" in text) == (name != "torch.compile / ours" and not threads)
    assert "4×6×5×5 | channels-last | backward" in text


def test_small_maps_are_sampled_whole():
    assert targets.sampler_for((32, 8, 7, 7)) == sbn.BatchSampling(1 / 16)
    assert targets.sampler_for((32, 8, 16, 16)) == sbn.FeatureSampling(1 / 16)
    assert targets.sampler_for((8, 8, 7, 7)) == sbn.FeatureSampling(1 / 16)


def test_no_target_without_rounds(capsys):
    with pytest.raises(SystemExit):
        targets.main(["--rounds", "-1"])
    assert "--rounds: expected an integer of at least 1, got '-1'" in capsys.readouterr().err
