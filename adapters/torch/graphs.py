"""A module's own forward as torch.fx graphs, and what in them a `SampledBatchNorm` can compute itself."""

from __future__ import annotations

import operator
import pickle
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from sbncore.adapters.torch.layers import SampledBatchNorm

_RELUS = {F.relu, torch.relu, torch.relu_}
_ADDS = {operator.add, operator.iadd, torch.add}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Leaves that write a tensor of their own and none of their arguments.
_FRESH = (nn.modules.conv._ConvNd, nn.Linear, SampledBatchNorm)


def inlined(module: nn.Module) -> bool:
    """Return whether the module has no code of its own; a hook is such, so that one is traced by itself."""
    return type(module) in _CONTAINERS and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def reach(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield what the module's own forward calls: its children and those of its plain containers."""
    for name, child in module.named_children():
        yield prefix + name, child
        if inlined(child):
            yield from reach(child, f"{prefix}{name}.")


# --- tracing ---


class Untraced(Exception):
    """Why a module's forward is left alone."""


class _Proxy(fx.Proxy):
    """A proxy that notes isinstance, and records ``a += b`` as what it is (fx makes it ``a = a + b``)."""

    tracer: _Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance(x, Tensor) comes here, and gets an answer that no tensor would give.
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            self.tracer.asked = True
        return type(self)


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.modes, self.asked = _modes(), False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is not nn.Sequential or not inlined(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:  # the graph would lose it
            raise fx.proxy.TraceError("it switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _draws() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()))


@dataclass(frozen=True)
class Traces:
    """A module's forward in training and in evaluation, and why neither could replace it, if so."""

    train: fx.Graph
    evaluation: fx.Graph
    frozen: str | None

    def codes(self) -> tuple[str, str]:
        """Return both as Python code, to compare."""
        return _code(self.train), _code(self.evaluation)


def traces(module: nn.Module) -> Traces:
    """Trace the module's forward; the module stays as it was.

    Raises:
        Untraced: where torch.fx fails, or a graph would not be what forward does.
    """
    if "forward" in vars(module):
        raise Untraced("its forward was replaced on the instance")
    modes = {child: child.training for child in module.modules()}
    before, draws = dict(vars(module)), _draws()
    try:
        (train, asked), (evaluation, _) = (_trace(module, modes, training) for training in (True, False))
        changed = [key for key in vars(module) if vars(module)[key] is not before.get(key, Untraced)]
    except Exception as error:  # the user's code on proxies may raise anything
        raise Untraced(str(error).strip().partition("\n")[0] or type(error).__name__) from error
    finally:
        vars(module).clear()
        vars(module).update(before)
        for child, mode in modes.items():
            child.training = mode
    changed = [key for key in changed if key != "training"]
    if changed:
        raise Untraced(f"its forward makes tensors or sets attributes: {', '.join(changed)}")
    if _draws() != draws:
        raise Untraced("its forward draws random numbers")
    if any(node.args or str(node.target).startswith("*") for node in train.find_nodes(op="placeholder")):
        raise Untraced("its forward takes optional arguments")
    if _code(train) != _code(evaluation):
        return Traces(train, evaluation, "the forward around it depends on self.training")
    return Traces(train, evaluation, "the forward around it asks for types" if asked else None)


def _trace(module: nn.Module, modes: dict[nn.Module, bool], training: bool) -> tuple[fx.Graph, bool]:
    for child in modes:
        child.training = training
    with torch.enable_grad():
        tracer = _Tracer()
        return tracer.trace(module), tracer.asked


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


# --- patterns ---


@dataclass(frozen=True)
class Edit:
    """A layer's call, the addition behind it, if any, and the ReLU."""

    layer: SampledBatchNorm
    norm: fx.Node
    add: fx.Node | None
    relu: fx.Node
    module: nn.Module | None  # the ReLU's, if it is one


def find(
    graph: fx.Graph, module: nn.Module, allowed: set[SampledBatchNorm], owners: Counter[nn.Module]
) -> tuple[list[Edit], dict[str, str]]:
    """Return what can be fused, and for each other layer before a ReLU, by its name, why it cannot."""
    layers = dict(module.named_modules(remove_duplicate=False))
    called = {node: layers[node.target] for node in graph.find_nodes(op="call_module")}
    calls, order = Counter(called.values()), {node: index for index, node in enumerate(graph.nodes)}
    edits, complaints = [], {}
    for relu in graph.nodes:
        source = _rectified(relu, called)
        if source is None:
            continue
        norms = [source] if source in called else _addends(source)
        norms = [norm for norm in norms if called.get(norm) in allowed]
        reasons = {}
        # The last one first: what it adds is then there when it is called.
        for norm in sorted(norms, key=order.__getitem__, reverse=True):
            reason = _obstacle(norm, relu, source, called, calls, owners)
            if reason is None:
                add = None if source is norm else source
                edits.append(Edit(called[norm], norm, add, relu, called.get(relu)))
                break
            reasons[str(norm.target)] = reason
        else:
            complaints.update(reasons)
    return edits, complaints


def _rectified(relu: fx.Node, called: dict[fx.Node, nn.Module]) -> fx.Node | None:
    """Return what the node takes the ReLU of, or None if it is no ReLU."""
    known = {
        "call_module": lambda: type(called[relu]) is nn.ReLU and not _hooked(called[relu]),
        "call_function": lambda: relu.target in _RELUS,
        "call_method": lambda: relu.target in ("relu", "relu_"),
    }
    if relu.op in known and known[relu.op]() and len(relu.all_input_nodes) == 1:
        return relu.all_input_nodes[0]
    return None


def _addends(add: fx.Node) -> list[fx.Node]:
    """Return the two tensors that the node adds, or nothing if it does something else."""
    known = add.target in (_ADDS if add.op == "call_function" else ("add", "add_"))
    plain = add.op in ("call_function", "call_method") and known
    options = {key: value for key, value in add.kwargs.items() if key not in ("input", "other")}
    # A parameter would broadcast. x.size(0) and the like are numbers.
    tensors = [
        node
        for node in add.all_input_nodes
        if node.op != "get_attr" and node.target not in (getattr, "size", "dim", "numel")
    ]
    count = len(add.args) + len(add.kwargs) - len(options)
    return tensors if plain and options in ({}, {"alpha": 1}) and len(tensors) == count == 2 else []


def _obstacle(
    norm: fx.Node,
    relu: fx.Node,
    source: fx.Node,
    called: dict[fx.Node, nn.Module],
    calls: Counter[nn.Module],
    owners: Counter[nn.Module],
) -> str | None:
    """Return why norm cannot be fused with source (itself, or the addition behind it) and relu, or None."""
    layer = called[norm]
    if calls[layer] > 1 or owners[layer] > 1:
        return "it is called more than once"
    if _hooked(layer):
        return "it has hooks"
    if len(norm.args) != 1 or norm.kwargs:
        return "it is called with more than its input"
    if set(norm.users) != {source if source is not norm else relu} or set(source.users) != {relu}:
        return "what it computes is used elsewhere too"
    if source is norm:
        return None
    written = source.args[0] if source.target in (operator.iadd, "add_") else norm
    if written is not norm and not _private(written, SampledBatchNorm, called, source):
        return "the addition writes into a tensor that is not the layer's"
    # The layer is to be called where the addition stands. Nothing may have overwritten its input by then.
    between = norm.next
    while isinstance(called.get(between), _FRESH):
        between = between.next
    if between is not source and not _private(norm.args[0], _FRESH, called, norm):
        return "what is added is computed after it, and its input may be overwritten until then"
    return None


def _private(
    value: object, kinds: type | tuple[type, ...], called: dict[fx.Node, nn.Module], user: fx.Node
) -> bool:
    """Return whether the value is the output of a module of these kinds that only the user reads."""
    if not isinstance(value, fx.Node):
        return False
    return isinstance(called.get(value), kinds) and set(value.users) == {user}
