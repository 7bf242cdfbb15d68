"""VirtualBatch beside dropout, checkpoints, threads, copies, the compiler: real samples see no difference."""

import copy
import pickle
import threading

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from virtual_models import K, Net, Seen, assert_same, gradients  # noqa: E402

import sbncore as sbn  # noqa: E402
from sbncore.adapters.torch.replay import checkpoint_contexts  # noqa: E402
from sbncore.adapters.torch.virtual import VirtualBatch, channel_noise  # noqa: E402

DROPOUTS = [
    nn.Dropout(0.4), nn.Dropout1d(0.4), nn.Dropout2d(0.4), nn.Dropout3d(0.4), nn.AlphaDropout(0.4),
    nn.FeatureAlphaDropout(0.4),
]  # fmt: skip


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    return torch.randn((6, 2, 5, 5), generator=generator) * 3 + 1


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dropout", DROPOUTS, ids=lambda one: type(one).__name__)
def test_dropout_is_for_real_samples_and_draws_as_without_virtual_ones(x, dropout, inplace):
    x = x.unsqueeze(2) if isinstance(dropout, nn.Dropout3d) else x
    x = x[..., 0] if isinstance(dropout, nn.Dropout1d) else x
    plain, dropout = copy.deepcopy(dropout), copy.deepcopy(dropout)
    plain.inplace = dropout.inplace = inplace
    before, after = Seen(), Seen()
    layers = nn.Sequential(nn.Tanh(), before, dropout, after)
    model = VirtualBatch(layers, K)
    torch.manual_seed(5)
    y = model(x)
    rng = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(y, plain(torch.tanh(x))) and torch.equal(rng, torch.get_rng_state())
    assert torch.equal(before.x[-K:], after.x[-K:]) and (y != torch.tanh(x)).any()
    changed = torch.tanh(x)
    plain(changed)
    assert torch.equal(before.x[:-K], torch.tanh(x)) == torch.equal(changed, torch.tanh(x))
    torch.manual_seed(5)
    assert torch.equal(layers(torch.cat((x, x))), plainly(plain, torch.tanh(torch.cat((x, x))), 5))
    model.eval()
    assert torch.equal(model(x), torch.tanh(x))


def plainly(dropout, x, seed):
    torch.manual_seed(seed)
    return dropout(x)


def test_gradients_pass_an_inplace_dropout(x):
    inplace = Net()
    plain = copy.deepcopy(inplace)
    inplace.drop.inplace = True
    inplace.middle = lambda x: inplace.drop(inplace.norm(inplace.conv(x)).relu() * 1.0)
    assert_same(gradients(VirtualBatch(inplace, K), x), gradients(VirtualBatch(plain, K), x))


def test_dropout_outside_the_batchs_axis_and_frozen_is_torchs_own(x):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(x.flatten(1).T).T

    model, plain = VirtualBatch(Turned(), K), Turned()
    torch.manual_seed(2)
    y = model(x)
    torch.manual_seed(2)
    assert torch.equal(y, plain(torch.cat((x, channel_noise(x, K, 0, 0))))[:6])
    model.model.drop.eval()
    assert torch.equal(model(x), x.flatten(1))


def test_a_model_wrapped_twice_and_nested_calls_keep_to_their_own_batches(x):
    drop = nn.Dropout(0.5)
    first, second = VirtualBatch(drop, 2), VirtualBatch(drop, 5)
    plain = nn.Dropout(0.5)
    for model in (first, second, VirtualBatch(nn.Sequential(VirtualBatch(nn.Dropout(0.5), 2)), 5)):
        torch.manual_seed(3)
        y = model(x)
        assert y.shape == x.shape
    torch.manual_seed(3)
    assert torch.equal(second(x), plainly(plain, x, 3))


def test_a_dropout_with_a_forward_of_its_own_keeps_it():
    drop = nn.Dropout(0.5)
    drop.forward = own = lambda x: x
    VirtualBatch(drop, K)
    assert drop.forward is own


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_virtual_batch_replays_its_noise(x, reentrant):
    model = VirtualBatch(Net(), K)
    again = copy.deepcopy(model)

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            y = checkpoint(self.model, x, use_reentrant=reentrant)
            self.model.model.drop(torch.ones(6 + K, 2))  # as many rows, none of them virtual
            return y

    for _ in range(2):
        assert_same(gradients(Checkpointed(again), x), gradients(model, x))
    assert again.num_batches_tracked == model.num_batches_tracked == 2


def test_checkpoint_contexts_replay_several_forwards_before_a_backward(x):
    model = VirtualBatch(Net(), K)
    again = copy.deepcopy(model)
    torch.manual_seed(0)
    (model(x).sum() * model(2 * x).sum()).backward()
    torch.manual_seed(0)
    one, two = (
        checkpoint(again, each, use_reentrant=False, context_fn=checkpoint_contexts) for each in (x, 2 * x)
    )
    (one.sum() * two.sum()).backward()
    assert_same([p.grad for p in again.parameters()], [p.grad for p in model.parameters()])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_the_model_drops_what_its_forward_dropped(x, reentrant):
    plain = VirtualBatch(Net(), K)
    inside = copy.deepcopy(plain)
    inside.model.checkpointed = {"use_reentrant": reentrant}
    for rows in (6, 4):
        assert_same(gradients(inside, x[:rows]), gradients(plain, x[:rows]))
    inside.model.norm.sampler = plain.model.norm.sampler = sbn.Full()
    batch = torch.cat((x, x[:K]))  # as many rows, none of them virtual
    assert_same(gradients(inside.model, batch), gradients(plain.model, batch))


def test_a_failed_forward_leaves_nothing_behind(x):
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    drop = nn.Dropout(0.5)
    model = VirtualBatch(nn.Sequential(drop, Failing()), K)
    with pytest.raises(RuntimeError, match="no"):
        model(x)
    assert model.num_batches_tracked == 0
    batch = torch.ones(6 + K, 2)
    torch.manual_seed(1)
    assert torch.equal(drop(batch), plainly(nn.Dropout(0.5), batch, 1))


def test_a_resumed_run_goes_on_with_the_noise(x):
    model = VirtualBatch(Net(0.0), K, seed=2)
    model(x)
    assert set(model.state_dict()) == {
        "num_batches_tracked", *(f"model.{name}" for name in model.model.state_dict()),
    }  # fmt: skip
    other = VirtualBatch(Net(0.0), K, seed=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x)) and other.num_batches_tracked == 2


def test_copies_are_independent_and_alike(x):
    model = VirtualBatch(Net(), K)
    model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.model.drop.forward.args[0] is copied.model.drop
        assert_same(gradients(copied, x), gradients(copy.deepcopy(model), x))
        copied.eval()
        assert model.model.drop.training
    assert model.num_batches_tracked == 1
    assert "count=3, seed=0" in repr(model)


def test_threads_do_not_see_each_others_batches(x):
    """The one thread's forward has stopped in its model while the other's dropout runs."""
    running, done = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x):
            running.set()
            assert done.wait(60)
            return x

    thread = threading.Thread(target=VirtualBatch(Waits(), K), args=(x,))
    drop = nn.Dropout(0.5)
    VirtualBatch(drop, K)
    batch = torch.ones(6 + K, 2)
    thread.start()
    assert running.wait(60)
    torch.manual_seed(1)
    ours = drop(batch)
    done.set()
    thread.join()
    assert torch.equal(ours, plainly(nn.Dropout(0.5), batch, 1))


@pytest.mark.parametrize("checkpointed", [None, {"use_reentrant": False}])
def test_the_compiler_sees_one_graph_and_compiles_it_once(x, checkpointed):
    import torch._dynamo.testing as dynamo

    torch._dynamo.reset()
    counter = dynamo.CompileCounterWithBackend("aot_eager")
    model = VirtualBatch(Net(checkpointed=checkpointed), K, seed=3)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=counter)
    ours = []
    thread = threading.Thread(target=lambda: ours.extend(gradients(compiled, x) for _ in range(4)))
    thread.start()  # where no batch has run before
    thread.join()
    assert len(ours) == 4
    for each in ours:
        assert_same(each, gradients(model, x))
    assert counter.frame_count == 1 and compiled.num_batches_tracked == 4


def test_a_compiled_model_inside_knows_when_no_virtual_samples_are_there(x):
    torch._dynamo.reset()
    drop = nn.Dropout(0.5)
    model = VirtualBatch(torch.compile(drop, backend="eager"), K)
    torch.manual_seed(1)
    assert torch.equal(model(x), plainly(nn.Dropout(0.5), x, 1))
    batch = torch.cat((x, x[:K]))
    torch.manual_seed(1)
    assert torch.equal(model.model(batch), plainly(nn.Dropout(0.5), batch, 1))
