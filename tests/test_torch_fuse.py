"""fuse changes who computes the ReLU and the addition, and nothing else."""

import copy
import io
import operator

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from fuse_models import (  # noqa: E402
    Block,
    Leaves,
    Of,
    ResNet,
    assert_same,
    assert_undone,
    calls,
    conv,
    norm,
    norms,
    outcome,
    simple,
)  # fmt: skip
from torch import fx, nn  # noqa: E402

from sbncore.adapters.torch.fuse import fuse, unfuse  # noqa: E402

# --- what is fused ---


def test_a_sequential_is_edited_in_place_and_keeps_its_indices():
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(
        conv(3), norm(), nn.ReLU(), nn.Sequential(conv(), norm(), relu), conv(), norm(), relu
    )
    other = assert_same(model, fused=3)
    assert (
        type(other) is nn.Sequential and type(other[2]) is type(other[3][2]) is type(other[6]) is nn.Identity
    )


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: F.relu(self.bn(self.conv(x))),
        lambda self, x: F.relu(self.bn(self.conv(x)), inplace=True),
        lambda self, x: torch.relu(input=self.bn(self.conv(x))),
        lambda self, x: torch.relu_(self.bn(self.conv(x))),
        lambda self, x: self.bn(self.conv(x)).relu(),
        lambda self, x: self.bn(self.conv(x)).relu_(),
        lambda self, x: F.relu_(self.bn(self.conv(x))),
    ],
)
def test_every_way_to_write_a_relu(forward):
    model = simple(forward)
    other = assert_same(model, fused=1)
    assert calls(other) == 0 and isinstance(other, Of)


def two(add):
    def forward(self, x):
        x = self.conv(x)
        return F.relu(add(self.bn(x), self.conv2(x)))

    return Of(forward, conv=conv(3), conv2=conv(), bn=norm())


@pytest.mark.parametrize(
    "add",
    [
        lambda a, b: a + b,
        lambda a, b: b + a,
        operator.iadd,
        torch.add,
        lambda a, b: torch.add(a, b, alpha=1),
        lambda a, b: torch.add(input=b, other=a),
        lambda a, b: a.add(b),
        lambda a, b: a.add_(b),
    ],
)
def test_every_way_to_write_an_addition(add):
    assert calls(assert_same(two(add), fused=1)) == 0


def test_a_resnet_keeps_one_layer_unfused_where_two_are_added():
    model = ResNet()
    other = assert_same(model, fused=5)
    assert calls(other) == 0
    block = other.layer1[1]
    assert block.downsample[1].activation == "relu" and block.bn2.activation is None
    assert type(other) is ResNet and isinstance(block, Block)  # the root in place, a block's forward anew
    assert block.relu is not None and type(block).__name__ == "Block"


def test_three_branches_as_in_repvgg():
    def forward(self, x):
        x = self.conv(x)
        return F.relu(self.a(x) + self.b(x) + self.c(x))

    model = Of(forward, conv=conv(3), a=norm(), b=nn.Sequential(conv(), norm()), c=norm())
    assert calls(assert_same(model, fused=1)) == 1


def test_a_residual_that_is_another_fused_relu():
    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return x + 1

    assert calls(assert_same(simple(forward), fused=2)) == 1


def test_a_graph_module_and_its_parent():
    block = Block()
    inner = fx.GraphModule(block, Leaves().trace(block))
    other = assert_same(nn.Sequential(conv(3), inner), fused=2)
    assert calls(other) == 0


def test_a_shared_module_is_fused_once_for_both_its_places():
    block = Block()
    other = assert_same(nn.Sequential(conv(3), block, block), fused=2)
    assert other[1] is other[2]


def test_twice_is_once():
    model, _ = fuse(ResNet())
    before = copy.deepcopy(model)
    again, notes = fuse(model)
    assert again is model and not notes
    assert [type(m) for m in model.modules()][1:3] == [type(m) for m in before.modules()][1:3]


def test_skipped_layers_can_be_fused_later():
    model = nn.Sequential(conv(3), Block())
    assert fuse(model, lambda name, module: name == "1.bn1") == (model, [])
    assert model[1].bn1.activation is None and model[1].bn2.activation == "relu"
    fuse(model, lambda name, module: name == "1")
    assert model[1].bn1.activation is None
    expected = outcome(copy.deepcopy(model))
    fuse(model)
    assert model[1].bn1.activation == "relu" and calls(model) == 0
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for a, b in zip(outcome(torch.load(pickled, weights_only=False)), expected, strict=True):
        torch.testing.assert_close(a, b)


# --- what stays ---


def test_copies_and_pickles_compute_the_same():
    model, _ = fuse(ResNet())
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    loaded, copied = torch.load(pickled, weights_only=False), copy.deepcopy(model)
    assert copied.layer1[0].bn1 is not model.layer1[0].bn1 and calls(loaded) == 0
    assert list(loaded.state_dict()) == list(copied.state_dict()) == list(model.state_dict())
    expected = outcome(model)
    for other in (loaded, copied):
        for a, b in zip(outcome(other), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_parameters_are_the_same_objects_and_modes_stay():
    model = ResNet()
    model.layer1[0].bn1.eval()
    model.layer1[1].train(False)
    parameters, modes = list(model.parameters()), [m.training for m in model.modules()]
    same, _ = fuse(model)
    assert same is model and all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [m.training for m in model.modules()] == modes


def test_hooks_around_fused_layers_go_on():
    model, seen = ResNet(), []
    model.layer1[0].register_forward_hook(lambda *args: seen.append("block"))
    model.layer1.register_forward_hook(lambda *args: seen.append("layer1"))
    _, notes = fuse(model)
    assert not notes and not seen and all(layer.activation for layer in norms(model.layer1[0]))
    model(torch.zeros(2, 3, 6, 6, dtype=torch.float64))
    assert seen == ["block", "layer1"]


def test_buffers_and_attributes_are_read_at_every_call():
    def forward(self, x):
        self.count.add_(1)
        return F.relu(self.bn(self.conv(x)) * self.one) * self.count + F.relu(self.bn2(self.conv2(x)))

    model = Of(forward, conv=conv(3), bn=norm(), conv2=conv(3), bn2=norm(), one=torch.ones(1).double())
    model.register_buffer("count", torch.zeros(()).double(), persistent=False)
    other = assert_same(model, fused=1)
    assert other.count == 3 and "count" not in other.state_dict()


def test_torch_compile_sees_one_graph():
    model, _ = fuse(nn.Sequential(conv(3), Block()))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


# --- and back ---


def test_undone_after_a_pickle():
    model = ResNet()
    file = io.BytesIO()
    torch.save(fuse(copy.deepcopy(model))[0], file)
    file.seek(0)
    unfused = torch.load(file, weights_only=False)
    unfuse(unfused)
    assert [type(a) for a in unfused.modules()] == [type(a) for a in model.modules()]
    assert all(layer.activation is None for layer in norms(unfused))


def test_a_part_of_a_fused_model_is_not_undone():
    """A layer alone still has to compute the ReLU that its surroundings no longer do."""
    model = fuse(nn.Sequential(conv(3), norm(), nn.ReLU()))[0]
    unfuse(model[1])
    assert model[1].activation == "relu"
    unfuse(model)
    assert model[1].activation is None and type(model[2]) is nn.ReLU


def test_an_activation_of_the_users_own_is_not_undone():
    layer = norm()
    layer.activation = "relu"
    assert_undone(nn.Sequential(conv(3), layer, conv(), norm(), nn.ReLU()))


def test_fused_again_and_undone():
    model = fuse(ResNet(), skip=lambda name, module: name.startswith("layer1"))[0]
    fuse(model)
    unfuse(model)
    assert all(layer.activation is None for layer in norms(model)) and type(model) is ResNet
