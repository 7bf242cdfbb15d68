"""Models converted and reverted: what is shared, kept, numbered, skipped and said."""

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import sbncore as sbn  # noqa: E402
from sbncore.adapters.torch import (  # noqa: E402
    SampledBatchNorm,
    SampledBatchNorm2d,
    convert_sampled_batchnorm,
    revert_sampled_batchnorm,
)

FS = sbn.FeatureSampling(1 / 4)


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None, affine=False)), nn.ReLU(),
        nn.Flatten(2), nn.BatchNorm1d(4, eps=1e-3, track_running_stats=False),
    )  # fmt: skip


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def test_parameters_and_buffers_are_shared_modes_kept_layers_numbered():
    plain = model()
    plain[1].eval()
    plain[3][1].weight_decay = 0.5  # somebody's own attribute
    seen = []
    plain[1].register_forward_hook(lambda module, args, y: seen.append(type(module)))
    tensors = {name: id(t) for name, t in plain.state_dict(keep_vars=True).items()}
    converted = convert_sampled_batchnorm(plain, FS, seed=3, gradient="detached")
    assert converted is plain
    layers = norms(converted)
    assert [type(layer).__name__ for layer in layers] == ["SampledBatchNorm2d"] * 2 + ["SampledBatchNorm1d"]
    assert [layer.layer for layer in layers] == [0, 1, 2] and {layer.seed for layer in layers} == {3}
    assert {(layer.gradient, layer.sampler) for layer in layers} == {("detached", FS)}
    assert {name: id(t) for name, t in converted.state_dict(keep_vars=True).items()} == tensors
    assert [layer.training for layer in layers] == [False, True, True]
    assert layers[1].momentum is None and layers[2].eps == 1e-3 and layers[1].weight_decay == 0.5
    converted(torch.randn(2, 3, 9, 9))
    assert seen == [SampledBatchNorm2d]
    again = convert_sampled_batchnorm(converted, sbn.Full())
    assert again is plain and {layer.sampler for layer in norms(again)} == {sbn.Full()}


def test_reverted_it_is_torchs_again():
    plain, twin = model(), model()
    x = torch.randn(4, 3, 9, 9)
    convert_sampled_batchnorm(plain, FS)
    reverted = revert_sampled_batchnorm(plain)
    assert reverted is plain and [type(a) for a in norms(plain)] == [type(a) for a in norms(twin)]
    assert torch.equal(reverted(x), twin(x)) and repr(reverted) == repr(twin)
    assert {*vars(reverted[1])} == {*vars(twin[1])}
    copy.deepcopy(reverted).load_state_dict(twin.state_dict())


def test_full_trains_as_torchs_layers_do():
    plain = model().double()
    ours = convert_sampled_batchnorm(copy.deepcopy(plain), sbn.Full(), fuse=True)
    optimizers = [torch.optim.SGD(each.parameters(), 0.01) for each in (plain, ours)]
    for _ in range(3):
        x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
        for each, optimizer in zip((plain, ours), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(plain.state_dict().values(), ours.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    fused = [layer.activation for layer in norms(ours)]
    assert fused == ["relu", "relu", None] and isinstance(ours[2], nn.Identity)
    reverted = revert_sampled_batchnorm(ours)
    assert type(reverted[1]) is nn.BatchNorm2d and type(reverted[6]) is nn.BatchNorm1d
    assert type(reverted[2]) is nn.ReLU and torch.allclose(reverted.eval()(x), plain.eval()(x))


def test_a_layer_with_an_activation_of_its_own_stays():
    model = nn.Sequential(SampledBatchNorm2d(4, sampler=FS, activation="relu"), nn.ReLU())
    reverted = revert_sampled_batchnorm(model)
    assert type(reverted[0]) is SampledBatchNorm2d and reverted[0].sampler == sbn.Full()
    assert reverted[0].activation == "relu"


def test_a_layer_alone_shared_layers_and_what_is_skipped():
    alone = convert_sampled_batchnorm(nn.BatchNorm2d(4), FS)
    assert type(alone) is SampledBatchNorm2d and type(revert_sampled_batchnorm(alone)) is nn.BatchNorm2d
    norm = nn.BatchNorm2d(4)
    shared = convert_sampled_batchnorm(nn.Sequential(norm, nn.ReLU(), norm), FS)
    assert shared[0] is shared[2] and type(shared[0]) is SampledBatchNorm2d
    shared = convert_sampled_batchnorm(nn.Sequential(norm, nn.ReLU(), norm), {"2": FS})
    assert shared[0] is shared[2] and shared[0].sampler == FS
    some = convert_sampled_batchnorm(model(), FS, skip=["3.1"])
    assert type(some[3][1]) is nn.BatchNorm2d and some[6].layer == 2
    some = convert_sampled_batchnorm(model(), FS, skip=lambda name, layer: isinstance(layer, nn.BatchNorm1d))
    assert type(some[6]) is nn.BatchNorm1d and type(some[3][1]) is SampledBatchNorm2d


def test_without_a_sampler_a_sixteenth_is_drawn_but_1024_values_at_least():
    converted = convert_sampled_batchnorm(model())
    assert converted[1].sampler == sbn.FeatureSampling(1 / 16, "runs", at_least=1024)
    assert converted[1].sampler.plan((128, 4, 28, 28)).count == 128 * 48
    assert converted[1].sampler.plan((128, 4, 7, 7)).count == 128 * 8


def test_converted_in_two_goes_no_two_layers_draw_alike():
    whole = model()
    convert_sampled_batchnorm(whole, FS, skip=["3.1"])
    convert_sampled_batchnorm(whole, {"3.1": FS})
    numbers = [layer.layer for layer in norms(whole)]
    assert sorted(numbers) == list(range(len(numbers)))


def test_device_and_dtype_are_kept():
    converted = convert_sampled_batchnorm(nn.BatchNorm2d(4, device="meta", dtype=torch.float64), FS)
    assert converted.weight.device.type == "meta" and converted.running_var.dtype == torch.float64


def test_sync_batch_norm_keeps_its_ranks():
    converted = convert_sampled_batchnorm(nn.Sequential(nn.SyncBatchNorm(4)), FS)
    assert type(converted[0]) is SampledBatchNorm and converted[0].process_group == "world"
    converted(torch.randn(4, 4, 8))  # one process needs no group
    reverted = revert_sampled_batchnorm(converted)
    assert type(reverted[0]) is nn.SyncBatchNorm and reverted[0].process_group is None


def test_torchs_own_conversion_replaces_ours_silently():
    """The trap that the documentation warns of."""
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(convert_sampled_batchnorm(model(), FS))
    assert type(converted[1]) is nn.SyncBatchNorm


class Custom(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).tanh()


def test_what_is_left_is_said():
    with pytest.warns(UserWarning, match="0: Custom has its own forward and is left"):
        assert type(convert_sampled_batchnorm(nn.Sequential(Custom(4)), FS)[0]) is Custom
    with pytest.warns(UserWarning, match="0: a lazy layer is converted after its first call"):
        convert_sampled_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()), FS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_sampled_batchnorm(nn.Sequential(Custom(4)), FS, skip=["0"])


class DependsOnData(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.bn(x)
        return torch.relu(y) if y.sum() > 0 else y


def test_what_cannot_be_fused_is_said_and_goes_on():
    with pytest.warns(UserWarning, match="0: not traced: "):
        made = convert_sampled_batchnorm(nn.Sequential(DependsOnData()), FS, fuse=True)
    assert made[0].bn.activation is None and made(torch.randn(4, 4, 8, 8)).shape == (4, 4, 8, 8)


def test_bad_arguments_change_nothing():
    plain = model()
    for kind, complaint, arguments, options in (
        (TypeError, "model: expected a torch.nn.Module, got list", ([], FS), {}),
        (TypeError, "sampler: expected a Sampler, got float", (plain, 0.5), {}),
        (ValueError, "gradient: expected one of", (plain, FS), {"gradient": "none"}),
        (TypeError, "seed: expected an integer", (plain, FS), {"seed": None}),
        (TypeError, "skip: expected a collection of names, got the string", (plain, FS), {"skip": "3.1"}),
        (ValueError, r"skip: expected names of BatchNorm layers of the model, got \['0'\]", (plain, FS),
         {"skip": ["0", "1"]}),
        (TypeError, "skip: expected a collection of names or a function, got None", (plain, FS),
         {"skip": None}),
        (ValueError, r"sampler: expected names of BatchNorm layers of the model, got \[0, 'x'\]",
         (plain, {"x": FS, 0: FS}), {}),
        (ValueError, "gradient: 'sampled' expects a sample of the batch", (plain, sbn.VirtualSamples(2)),
         {"gradient": "sampled"}),
    ):  # fmt: skip
        with pytest.raises(kind, match=complaint):
            convert_sampled_batchnorm(*arguments, **options)
        assert not [layer for layer in norms(plain) if isinstance(layer, SampledBatchNorm)]


class Trivial(nn.BatchNorm2d):
    """Adds nothing."""


class Deeper(Trivial):
    def __init__(self, channels):
        super().__init__(channels, eps=1e-3, momentum=0.2)


class Helped(nn.BatchNorm2d):
    def fold(self):
        return self.weight


def test_a_subclass_that_adds_nothing_is_converted_and_comes_back():
    made = convert_sampled_batchnorm(nn.Sequential(Trivial(4), Deeper(4)), FS)
    assert [type(layer) for layer in made] == [SampledBatchNorm2d] * 2 and made[1].eps == 1e-3
    again = convert_sampled_batchnorm(made, sbn.Full())
    reverted = revert_sampled_batchnorm(again)
    assert [type(layer) for layer in reverted] == [Trivial, Deeper]
    assert {*vars(reverted[1])} == {*vars(Deeper(4))}
    with pytest.warns(UserWarning, match="0: Helped has fold of its own and is left"):
        convert_sampled_batchnorm(nn.Sequential(Helped(4)), FS)
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    with pytest.warns(UserWarning, match="BatchNorm2d has its own forward and is left"):
        assert convert_sampled_batchnorm(layer, FS) is layer


def test_a_model_without_batch_normalization_is_said():
    plain = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    with pytest.warns(UserWarning, match="Sequential has no BatchNorm layer, and stays as it is") as said:
        assert convert_sampled_batchnorm(plain, FS) is plain
    assert len(said) == 1


def test_many_notes_are_one_warning():
    plain = nn.Sequential(*(Custom(4) for _ in range(49)), Helped(4), DependsOnData())
    with pytest.warns(UserWarning) as said:
        convert_sampled_batchnorm(plain, FS, fuse=True)
    assert len(said) == 1
    lines = str(said[0].message).splitlines()
    assert len(lines) == 3 and lines[0].startswith("0, 1, 2, ")
    assert lines[0].endswith("48: Custom has its own forward and is left")


def test_wrong_names_are_answered_by_the_right_ones():
    for options in ({"sampler": {"bn1": FS}}, {"sampler": FS, "skip": ["bn1"]}):
        with pytest.raises(ValueError, match=r"got \['bn1'\]; it has '1', '3.1', '6'$"):
            convert_sampled_batchnorm(model(), **options)
    with pytest.raises(ValueError, match=r"got \['bn1'\]; it has none$"):
        convert_sampled_batchnorm(nn.Linear(2, 3), {"bn1": FS})


def test_options_out_of_range_are_refused_before_anything_is_replaced():
    plain = model()
    plain[3][1].eps = -1.0
    with pytest.raises(ValueError, match=r"3\.1: eps: expected a positive number, got -1\.0"):
        convert_sampled_batchnorm(plain, FS)
    plain[3][1].eps, plain[6].momentum = 1e-5, 5.0
    with pytest.raises(ValueError, match="6: momentum: expected a number in"):
        convert_sampled_batchnorm(plain, FS)
    with pytest.raises(TypeError, match="process_group: expected None, 'world' or a ProcessGroup, got 'all'"):
        convert_sampled_batchnorm(model(), FS, process_group="all")
    assert not [layer for layer in norms(plain) if isinstance(layer, SampledBatchNorm)]
