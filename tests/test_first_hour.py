"""What a newcomer meets in the first hour: what is printed, listed, warned of and hinted at."""

import subprocess
import sys

import numpy as np
import pytest

import sbncore as sbn
from sbncore.adapters.numpy import SampledBatchNorm


@pytest.mark.parametrize(
    "sampler, words",
    [
        (sbn.Full(), ["25088 of 25088 values per channel (100.0%)", "all of 32 samples"]),
        (
            sbn.FeatureSampling(1 / 16, "runs"),
            ["48 of 784 positions of every map of 32 samples, in 3 runs of 16, 272 apart", "for each sample"],
        ),
        (sbn.FeatureSampling(1 / 16, place="common"), ["in one run, at one place for all"]),
        (sbn.BatchSampling(4, "random"), ["4 of 32 samples, at random, whole"]),
        (sbn.BatchSampling(4, "strided"), ["4 of 32 samples, every 8th, whole"]),
        (sbn.BatchSampling(4), ["4 of 32 samples, one behind the other, whole"]),
        (sbn.NaiveSampling(64), ["64 single positions anywhere in 32 samples"]),
        (
            sbn.Mixture([(0.5, sbn.BatchSampling(4)), (0.5, sbn.VirtualSamples(4))]),
            ["weight 0.5: 4 of 28 samples", "weight 0.5: all of samples 28 to 31"],
        ),
        (sbn.Prior(0.1, sbn.BatchSampling(2)), ["weight 0.1: the given statistics"]),
    ],
)
def test_a_plan_is_printed_in_words(sampler, words):
    text = str(sampler.plan((32, 64, 28, 28), seed=5, layer=2, step=3))
    assert "drawn by seed 5, layer 2, step 3" in text and all(each in text for each in words), text


def test_layers_say_what_they_are():
    layer = SampledBatchNorm(64, sampler=sbn.FeatureSampling(1 / 16), activation="relu", layer=3)
    assert repr(layer).startswith("SampledBatchNorm(64, eps=1e-05, momentum=0.1, sampler=FeatureSampling(")
    assert repr(layer).endswith("layer=3, activation='relu')")


def test_dir_lists_the_public_names():
    assert dir(sbn) == sorted(sbn.__all__) and "forward" in dir(sbn) and "checks" not in dir(sbn)


def test_a_count_of_one_position_is_warned_of():
    with pytest.warns(UserWarning, match=r"an int is a count.*1.0 is everything") as caught:
        sbn.FeatureSampling(1)
    assert caught[0].filename == __file__
    sbn.FeatureSampling(1.0), sbn.FeatureSampling(1, at_least=64), sbn.BatchSampling(1)


def test_channels_last_data_without_channel_axis_is_hinted_at():
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    with pytest.raises(
        ValueError, match=r"weight: .*\(8,\) for 8 channels.* 3 channels where channel_axis=-1"
    ):
        sbn.forward(x, np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"got \(5,\)$"):
        sbn.forward(x, np.ones(5, np.float32))


@pytest.mark.parametrize("name", ["torch", "jax", "flax"])
def test_without_its_framework_an_adapter_says_what_to_install(name):
    code = f"import sys; sys.modules['{name}'] = None; import sbncore.adapters.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and f"pip install 'sbncore[{name}]'" in done.stderr.splitlines()[-1]
