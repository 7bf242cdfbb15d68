"""fuse leaves alone, and says so, what the layer would not compute as the model does."""

import copy
import random

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from fuse_models import Block, Of, assert_same, conv, norm, simple  # noqa: E402
from torch import nn  # noqa: E402

from sbncore.adapters.torch.fuse import fuse  # noqa: E402

# --- what is overwritten ---


def overwrites_another(self, x):
    x = self.conv(x)
    y = self.bn(x)
    x += y
    return F.relu(x)


def overwrites_through_an_alias(self, x):
    x = self.conv(x)
    kept = x.view(x.shape)
    x += self.bn(self.conv2(x))
    return F.relu(x) + kept


def input_overwritten_in_between(self, x):
    x = self.conv(x)
    y = self.bn(x)
    return F.relu(y + F.relu(x, inplace=True))


def input_overwritten_by_a_module(self, x):
    x = self.conv(x)
    y = self.bn(x)
    return F.relu(y + self.relu(x))


def residual_overwritten_in_between(self, x):
    x = self.conv(x)
    y = self.bn(self.conv2(x))
    x.mul_(2)
    return F.relu(y + x)


# --- what is not fused ---


def stop(part, forward, fused=0, **children):
    return pytest.param(simple(forward, **children), fused, [part] if part else [], id=part or "unseen")


def used_twice(self, x):
    y = self.bn(self.conv(x))
    return F.relu(y) + y


def sum_used_twice(self, x):
    x = self.conv(x)
    y = self.bn(x) + x
    return F.relu(y) + y


def shared_layer(self, x):
    x = F.relu(self.bn(self.conv(x)))
    return F.relu(self.bn(x))


def depends_on_training(self, x):
    x = F.relu(self.bn(self.conv(x)))
    return F.dropout(x, 0.0, self.training) * (2 if self.training else 1)


def asks_for_types(self, x):
    return F.relu(self.bn(self.conv(x if isinstance(x, torch.Tensor) else x[0])))


def switches_gradients(self, x):
    with torch.no_grad():
        y = self.conv(x) * 2
    return F.relu(self.bn(self.conv(x)) + y)


def depends_on_data(self, x):
    x = self.bn(self.conv(x))
    return F.relu(x) if x.sum() > -1e9 else x


def random_path(self, x):
    x = F.relu(self.bn(self.conv(x)))
    return x if random.random() < 2 else 2 * x


def makes_tensors(self, x):
    return F.relu(self.bn(self.conv(x))) * torch.ones(1).double()


def keeps_a_value(self, x):
    self.kept = self.bn(self.conv(x))
    return F.relu(self.kept)


def with_parameter(self, x):
    return F.relu(self.bn(self.conv(x)) + self.shift)


@pytest.mark.parametrize(
    ("model", "fused", "notes"),
    [
        stop(None, lambda self, x: F.relu6(self.bn(self.conv(x)))),
        stop(None, lambda self, x: F.leaky_relu(self.bn(self.conv(x)))),
        stop(None, lambda self, x: self.act(self.bn(self.conv(x))), act=nn.ReLU6()),
        stop(None, lambda self, x: F.relu(self.bn(self.conv(x)) + 1)),
        stop(None, lambda self, x: F.relu(torch.add(self.bn(self.conv(x)), self.conv(x), alpha=2))),
        stop(None, lambda self, x: F.relu(self.bn(self.conv(x)) + x.size(0))),
        stop(None, lambda self, x: F.relu(self.bn(self.conv(x)) - self.conv(x))),
        stop(None, with_parameter, shift=nn.Parameter(torch.ones(4, 1, 1).double())),
        stop("bn: not fused: what it computes is used elsewhere too", used_twice),
        stop("bn: not fused: what it computes is used elsewhere too", sum_used_twice),
        stop("bn: not fused: the forward around it depends on self.training", depends_on_training),
        stop("bn: not fused: the forward around it asks for types", asks_for_types),
        stop("Of: not traced: it switches gradients", switches_gradients),
        stop("Of: not traced: symbolically traced variables cannot be used", depends_on_data),
        stop("Of: not traced: its forward draws random numbers", random_path),
        stop("Of: not traced: its forward makes tensors", makes_tensors),
        stop("Of: not traced: its forward makes tensors or sets attributes: kept", keeps_a_value),
    ],
)
def test_what_would_not_be_the_same_is_left(model, fused, notes):
    assert_same(model, fused=fused, notes=notes)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (overwrites_another, "the addition writes into a tensor that is not the layer's"),
        (overwrites_through_an_alias, "the addition writes into a tensor that is not the layer's"),
        (input_overwritten_in_between, "its input may be overwritten until then"),
        (input_overwritten_by_a_module, "its input may be overwritten until then"),
        (residual_overwritten_in_between, None),
    ],
)
def test_what_is_overwritten_in_place_is_minded(forward, reason):
    model = Of(forward, conv=conv(3), conv2=conv(), bn=norm(), relu=nn.ReLU(inplace=True))
    other, notes = fuse(copy.deepcopy(model))
    assert len(notes) == (reason is not None) and all(note.endswith(reason) for note in notes)
    assert (other.bn.activation is None) == (reason is not None)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-12)


def test_tracing_leaves_no_trace():
    for forward in (makes_tensors, keeps_a_value, depends_on_data, switches_gradients):
        model = simple(forward)
        before, states = dict(vars(model)), torch.get_rng_state()
        fuse(model)
        assert vars(model) == before and (torch.get_rng_state() == states).all()


def test_a_shared_layer_is_left():
    model = Of(shared_layer, conv=conv(3), bn=norm())
    assert_same(model, fused=0, notes=["bn: not fused: it is called more than once"] * 1)
    layer = norm()
    model = nn.Sequential(conv(3), nn.Sequential(Block(), Block()))
    model[1][0].bn1 = model[1][1].bn1 = layer
    assert_same(model, fused=2, notes=["more than once"] * 2)


def test_a_doubled_operand_is_left():
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y + y)

    assert_same(simple(forward), fused=0)


def test_a_layer_or_relu_with_hooks_is_left():
    model = nn.Sequential(conv(3), norm(), nn.ReLU(), conv(), norm(), nn.ReLU())
    model[1].register_forward_hook(lambda *args: None)
    model[5].register_forward_hook(lambda *args: None)
    assert_same(model, fused=0, notes=["1: not fused: it has hooks"])


def test_modules_in_training_dependent_code_are_still_swapped():
    def forward(self, x):
        x = self.stem(x)
        return x * 2 if self.training else x

    model = Of(forward, stem=nn.Sequential(conv(3), norm(), nn.ReLU()))
    assert type(assert_same(model, fused=1).stem[2]) is nn.Identity


def test_children_of_untraceable_modules_are_fused():
    def forward(self, x):
        x = self.stem(x)
        return self.blocks[0](x) if x.sum() > -1e9 else x

    model = Of(forward, stem=nn.Sequential(conv(3), norm(), nn.ReLU()), blocks=nn.ModuleList([Block()]))
    assert_same(model, fused=3, notes=["Of: not traced"])


def test_code_that_asks_for_its_relus_keeps_them():
    def forward(self, x):
        taps = []
        for layer in self.stem:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                taps.append(x * 2)
        return sum(taps) + x

    model = Of(forward, stem=nn.Sequential(conv(3), norm(), nn.ReLU()))
    assert_same(model, fused=0, notes=["Of: not fused: its forward asks for the types of its layers"])


def test_optional_arguments_and_replaced_forwards_are_left():
    class Optional(Block):
        def forward(self, x, mask=None):
            return super().forward(x if mask is None else x * mask)

    model = nn.Sequential(conv(3), Optional(), Block())
    model[2].forward = model[2].forward
    assert_same(model[:2], fused=0, notes=["1: not traced: its forward takes optional arguments"])
    _, notes = fuse(model)
    assert notes[1] == "2: not traced: its forward was replaced on the instance"


def test_an_addition_that_broadcasts_says_so_when_called():
    def forward(self, x):
        x = self.conv(x)
        return F.relu(self.bn(x) + self.conv2(x).mean((2, 3), keepdim=True))

    model, _ = fuse(Of(forward, conv=conv(3), conv2=conv(), bn=norm()))
    if model.bn.activation:
        with pytest.raises(ValueError, match="residual: expected shape"):
            model(torch.zeros(2, 3, 6, 6, dtype=torch.float64))


def test_a_relu_module_that_serves_others_too_stays():
    def both(self, x):
        return self.relu(self.conv2(self.relu(self.bn(self.conv(x)))))

    assert isinstance(assert_same(simple(both, relu=nn.ReLU()), fused=1).relu, nn.ReLU)

    def in_evaluation(self, x):
        x = self.relu(self.bn(self.conv(x)))
        return x if self.training else self.relu(self.conv2(x))

    model = simple(in_evaluation, relu=nn.ReLU())
    assert_same(model, fused=0, notes=["bn: not fused: the forward around it depends on self.training"])


def test_a_relu_in_a_part_that_two_modules_share_stays():
    tail = nn.Sequential(nn.ReLU(), conv())
    first = simple(lambda self, x: self.tail(self.bn(self.conv(x))), tail=tail)
    second = Of(lambda self, x: self.tail(x), tail=tail)
    assert isinstance(assert_same(nn.Sequential(first, second), fused=1)[1].tail[0], nn.ReLU)
