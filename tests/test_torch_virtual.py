"""VirtualBatch: synthetic samples go in with a training batch and leave no trace in what comes out."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from virtual_models import K, Net, Pair, Seen, assert_same, gradients  # noqa: E402

import sbncore as sbn  # noqa: E402
from sbncore import noise  # noqa: E402
from sbncore.adapters.torch.layers import SampledBatchNorm1d, SampledBatchNorm2d  # noqa: E402
from sbncore.adapters.torch.virtual import VirtualBatch, channel_noise, white_noise  # noqa: E402


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    return torch.randn((6, 2, 5, 5), generator=generator) * 3 + 1


@pytest.mark.parametrize("name", [(0, 0), (7, 120), (-5, 2**40), (2**70 + 3, -1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_noise_is_numpys_bit_for_bit(name, dtype):
    seed, step = name
    expected = noise.white_noise((3, 2, 5, 7), seed=seed, step=step, dtype=dtype)
    for given in (step, torch.tensor(step)):
        ours = white_noise((3, 2, 5, 7), seed=seed, step=given, dtype=getattr(torch, dtype))
        assert str(ours.dtype) == f"torch.{dtype}" and np.array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0, 2), (3,)])
def test_the_noise_may_be_empty_or_of_one_axis(shape):
    assert white_noise(shape).shape == shape


@pytest.mark.parametrize("shape", [(50, 3), (7, 3, 40), (4, 3, 9, 9)])
def test_channel_noise_has_the_batchs_moments(shape):
    along, axes = (3, *[1] * (len(shape) - 2)), [0, *range(2, len(shape))]
    deviation, mean = torch.tensor([1.0, 5.0, 0.1]).view(along), torch.tensor([0.0, 1e4, -3.0]).view(along)
    x = mean + deviation * torch.randn(shape, dtype=torch.float64)
    virtual = channel_noise(x, 4000, 0, 0)
    var, mean = torch.var_mean(x, axes, correction=0)
    ours_var, ours_mean = torch.var_mean(virtual, axes, correction=0)
    assert ((ours_mean - mean).abs() < 0.08 * var.sqrt()).all()
    assert ((ours_var / var - 1).abs() < 0.1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_virtual_samples_follow_the_real_ones_in_their_dtype_and_memory(x, dtype):
    for memory in (torch.contiguous_format, torch.channels_last):
        given = x.to(dtype).contiguous(memory_format=memory)
        model = VirtualBatch(Seen(), K, seed=9)
        y = model(given)
        seen = model.model.x
        assert y.dtype == seen.dtype == dtype and torch.equal(y, given) and torch.equal(seen[:6], given)
        assert torch.equal(seen[6:], channel_noise(given, K, 9, 0))
        assert seen.is_contiguous(memory_format=memory)


def test_every_step_has_its_own_noise_and_evaluation_none(x):
    model = VirtualBatch(Seen(), K)
    drawn = []
    for _ in range(3):
        model(x)
        drawn.append(model.model.x[6:])
    assert model.num_batches_tracked == 3
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    model.eval()
    assert model(x) is x and model.num_batches_tracked == 3
    assert model(None) is None


def test_values_and_gradients_are_those_of_a_batch_put_together_by_hand(x):
    x = x.double()
    net = Net(0.0, sbn.Mixture([(0.5, sbn.Full()), (0.5, sbn.VirtualSamples(K))])).double()
    by_hand = copy.deepcopy(net)
    by_hand.norm.own_rows = True
    assert_same(
        gradients(VirtualBatch(net, K, seed=4), x), gradients(ByHand(by_hand, channel_noise(x, K, 4, 0)), x)
    )
    assert torch.equal(net.norm.running_mean, by_hand.norm.running_mean)


class ByHand(nn.Module):
    def __init__(self, net, virtual):
        super().__init__()
        self.net, self.virtual = net, virtual

    def forward(self, x):
        return self.net(torch.cat((x, self.virtual)))[: len(x)]


def test_the_gradient_passes_a_numerical_check():
    norm = SampledBatchNorm1d(3, sampler=sbn.VirtualSamples(K)).double()
    fixed = torch.randn(K, 3, dtype=torch.float64)
    model = VirtualBatch(norm, K, lambda x, count, seed, step: fixed * x.mean())
    assert torch.autograd.gradcheck(model, torch.randn(4, 3, dtype=torch.float64, requires_grad=True))


def test_outputs_are_stripped_wherever_they_are(x):
    class Many(nn.Module):
        def forward(self, x):
            kept = torch.zeros(4), torch.tensor(1.5), None, "text", 9
            return {"a": [x, (x.sum((1, 2, 3)), Pair(x[:, 0], kept))], "b": x.flatten(1)}

    y = VirtualBatch(Many(), K)(x)
    first, (sums, pair) = y["a"]
    assert torch.equal(first, x) and sums.shape == (6,) and y["b"].shape == (6, 50)
    assert type(pair) is Pair and pair.first.shape == (6, 5, 5)
    assert pair.second[0].shape == (4,) and pair.second[1] == 1.5 and pair.second[2:] == (None, "text", 9)


def test_other_arguments_pass_as_they_are(x):
    model = VirtualBatch(Seen(), K)
    labels = torch.arange(6)
    model(x, labels, scale=2)
    assert model.model.args == (labels,) and model.model.kwargs == {"scale": 2}


def test_a_distribution_of_ones_own(x):
    def names(x, count, seed, step):
        assert step.dtype == torch.int64 and step.shape == ()
        return x.new_full((count, *x.shape[1:]), seed + int(step))

    model = VirtualBatch(Seen(), K, names, seed=10)
    for step in range(3):
        model(x)
        assert (model.model.x[6:] == 10 + step).all()
    tokens = torch.arange(12).view(6, 2)
    model(tokens)
    assert model.model.x.dtype == torch.int64 and (model.model.x[6:] == 13).all()
    assert model(x[:0]).shape == (0, 2, 5, 5) and model.model.x.shape == (K, 2, 5, 5)


def test_a_distribution_that_is_a_module_is_trained(x):
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(torch.randn(K, 2, 5, 5))

        def forward(self, x, count, seed, step):
            return self.rows

    model = VirtualBatch(Net(), K, Learned())
    (model(x) ** 2).sum().backward()
    assert model.distribution.rows.grad.abs().max() > 0
    assert "distribution.rows" in model.state_dict()


def test_it_trains_where_one_sample_a_batch_is_too_few(x):
    """Batches of one with one value per channel at the layer, which batch normalization refuses."""
    torch.manual_seed(0)
    images, labels = torch.randn(16, 2, 4, 4), torch.arange(16) % 2
    images[labels == 1, 0] += 2
    model = VirtualBatch(
        nn.Sequential(nn.Flatten(), nn.Linear(32, 8), SampledBatchNorm1d(8, sampler=sbn.VirtualSamples(8)),
                      nn.ReLU(), nn.Linear(8, 2)), 8,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for step in range(96):
        one = slice(step % 16, step % 16 + 1)
        loss = F.cross_entropy(model(images[one]), labels[one])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-16:]) < 0.5 * np.mean(losses[:16])


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (TypeError, "model: expected a torch.nn.Module, got builtin_function_or_method", (len, 1)),
        (TypeError, "VirtualBatch: count: expected an integer, got 2.0", (nn.ReLU(), 2.0)),
        (TypeError, "VirtualBatch: count: expected an integer, got True", (nn.ReLU(), True)),
        (ValueError, "VirtualBatch: expected a count of at least 1, got 0", (nn.ReLU(), 0)),
        (TypeError, r"distribution: expected a function of \(x, count, seed, step\), got 'normal'",
         (nn.ReLU(), 1, "normal")),
        (ValueError, r"model.norm: expected a sampler with VirtualSamples\(2\).*got VirtualSamples\(k=3\)",
         (Net(), 2)),
        (ValueError, r"model.norm: expected a sampler with VirtualSamples\(2\).*got Full",
         (Net(sampler=sbn.Full()), 2)),
        (ValueError, r"model.1: expected a sampled layer.*got BatchNorm1d, whose statistics",
         (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), 2)),
        (ValueError, "model: expected a sampled layer.*got SyncBatchNorm", (nn.SyncBatchNorm(3), 2)),
        (ValueError, "model: expected a sampled layer.*got LazyBatchNorm2d", (nn.LazyBatchNorm2d(), 2)),
    ],
)  # fmt: skip
def test_complaints_at_construction(kind, message, arguments):
    with pytest.raises(kind, match=message):
        VirtualBatch(*arguments)


def test_a_seed_is_an_integer():
    with pytest.raises(TypeError, match=r"seed: expected an integer, got 0\.5"):
        VirtualBatch(nn.ReLU(), 1, seed=0.5)


def test_mixtures_and_priors_with_virtual_samples_are_welcome():
    mixture = sbn.Mixture([(0.5, sbn.BatchSampling(2)), (0.5, sbn.VirtualSamples(K))])
    for sampler in (mixture, sbn.Prior(0.1, mixture)):
        VirtualBatch(Net(sampler=sampler), K)
    VirtualBatch(nn.Sequential(nn.GroupNorm(1, 2), nn.InstanceNorm2d(2)), K)


@pytest.mark.parametrize(
    ("kind", "message", "given"),
    [
        (TypeError, "x: expected a tensor, or .* with floating ones, got ndarray", np.zeros((4, 2))),
        (ValueError, r"x: expected \(N, C, \*spatial\), at least 2 axes, got shape \(4,\)", torch.zeros(4)),
        (TypeError, "x: expected a floating dtype, got torch.int64; a distribution=",
         torch.zeros(4, 2, dtype=torch.int64)),
        (ValueError, r"x: expected more than 1 value per channel.*got shape \(0, 2, 3\)",
         torch.zeros(0, 2, 3)),
        (ValueError, r"x: expected more than 1 value per channel.*got shape \(1, 2\)", torch.zeros(1, 2)),
        (TypeError, "x: expected a tensor, .*, got list; a list of images becomes one inside",
         [torch.zeros(2, 4, 4), torch.zeros(2, 5, 5)]),
        (TypeError, "x: expected a tensor, .*, got dict", {"ids": torch.zeros(4, 2, dtype=torch.int64)}),
        (ValueError, r"x: expected tensors of as many samples, got shapes \[\(4, 2, 3\), \(5, 2, 3\)\]",
         (torch.zeros(4, 2, 3), torch.zeros(5, 2, 3))),
    ],
)  # fmt: skip
def test_complaints_about_x_count_nothing(kind, message, given):
    model = VirtualBatch(nn.Sequential(Seen()), K)
    with pytest.raises(kind, match=message):
        model(given)
    assert model.num_batches_tracked == 0 and not hasattr(model.model[0], "x")


@pytest.mark.parametrize(
    ("kind", "message", "made"),
    [
        (TypeError, "distribution: expected a tensor, got NoneType", None),
        (ValueError, r"distribution: expected shape \(3, 2, 5, 5\), got \(3, 2\)", torch.zeros(3, 2)),
        (TypeError, "distribution: expected torch.float32 as x, got torch.float64",
         torch.zeros(3, 2, 5, 5, dtype=torch.float64)),
        (ValueError, "distribution: expected x's device cpu, got meta",
         torch.zeros(3, 2, 5, 5, device="meta")),
    ],
)  # fmt: skip
def test_complaints_about_a_distribution_count_nothing(x, kind, message, made):
    model = VirtualBatch(Seen(), K, lambda x, count, seed, step: made)
    with pytest.raises(kind, match=message):
        model(x)
    assert model.num_batches_tracked == 0


def test_tuples_and_dicts_of_tensors_are_extended(x):
    model = VirtualBatch(Seen(), K, seed=9)
    mask = torch.arange(6) % 2 == 0
    given = {"image": x, "depth": x[:, :1] + 1, "mask": mask, "size": torch.tensor(3), "name": "a"}
    returned = model(given)
    seen = model.model.x
    assert seen["image"].shape == (9, 2, 5, 5) and torch.equal(seen["image"][6:], channel_noise(x, K, 9, 0))
    assert seen["depth"].shape == (9, 1, 5, 5) and torch.equal(seen["mask"], torch.cat((mask, mask[:3])))
    other = channel_noise(given["depth"], K, 9, 0)
    assert not torch.equal(seen["depth"][6:], other)  # noise of its own
    assert seen["size"] == 3 and seen["name"] == "a"
    assert returned.keys() == given.keys()
    assert all(torch.equal(returned[k], given[k]) for k in ("image", "depth", "mask", "size"))
    left, right = model((x, x.double()))
    assert torch.equal(left, x) and right.dtype == torch.float64


class Detector(nn.Module):
    """As torchvision's: images of any size in a list, targets beside them, losses in training."""

    def __init__(self):
        super().__init__()
        norm = SampledBatchNorm2d(4, sampler=sbn.VirtualSamples(K))
        self.backbone = VirtualBatch(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm), K)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, images, targets):
        height, width = (max(image.shape[k] for image in images) for k in (1, 2))
        padded = [F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images]
        scores = self.head(self.backbone(torch.stack(padded))).amax((1, 2, 3))
        assert len(scores) == len(targets) == len(images)
        return {"loss": sum((s - t["score"]) ** 2 for s, t in zip(scores, targets, strict=True))}


def test_a_detectors_backbone_is_wrapped():
    detector = Detector()
    images = [torch.randn(3, 9, 7), torch.randn(3, 6, 12)]
    loss = detector(images, [{"score": 1.0}, {"score": 0.0}])["loss"]
    loss.backward()
    assert detector.backbone.model[0].weight.grad.abs().sum() > 0
    compiled = torch.compile(detector.backbone, fullgraph=True, backend="eager")
    assert compiled(torch.randn(2, 3, 8, 8)).shape == (2, 4, 8, 8)
