"""BN then ReLU, and BN, addition, ReLU: found in a model's code, given to the layer as one call, and back.

What `fuse` changes bears a token of its own, which `unfuse` knows the layers by that belong to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn

from sbncore.adapters.torch.graphs import Edit, Traces, Untraced, find, inlined, reach, traces
from sbncore.adapters.torch.layers import SampledBatchNorm


def fuse(
    model: nn.Module, skip: Callable[[str, nn.Module], bool] = lambda name, module: False
) -> tuple[nn.Module, list[str]]:
    """Let every `SampledBatchNorm` compute the ReLU behind it, and the addition between, where that is safe.

    Works in place. A ReLU module that serves nothing else becomes ``nn.Identity``. Elsewhere the module
    around the layer gets a new ``forward`` by torch.fx, in a subclass of its class under the same name:
    parameters, ``state_dict``, hooks, attributes and methods stay, copies and pickles work. The Python state
    that its ``forward`` read, tensors and modules apart, is frozen as it is now, and its other methods must
    not call a layer whose addition was fused. Hooks on an ``nn.Sequential`` in it must be there before.

    Call it before torch.compile and wrappers such as DistributedDataParallel. A layer is taken to be called
    by the module that it lies in, and an ``nn.Sequential`` as a whole where its module cannot be traced.

    Args:
        model: any module; calling it twice changes nothing more.
        skip: skip(name, module) is asked for modules whose ``forward`` would be traced and for layers; those
            for which it is true are left alone.

    Returns:
        model itself, and a message for everything that was found and could not be fused, by name.

    Raises:
        Nothing of its own. A fused addition that broadcasts raises ValueError when the layer is called: skip
        that layer.
    """
    units: dict[nn.Module, str] = {}
    _collect("", model, units)
    owners = Counter(child for unit in units for child in {child for _, child in reach(unit)})
    notes: list[str] = []
    for unit, name in units.items():
        _fuse(unit, name, owners, skip, notes)
    return model, notes


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`, in place: each module's class, ``forward`` and ReLU modules are as they were.

    Of a layer whose surroundings are not in the model, and of a ``torch.fx.GraphModule``, whose graph is
    another since, nothing is undone.
    """
    undone = []
    for module in [*model.modules()]:
        if hasattr(type(module), "_unfused") and "_fused" in vars(module):
            undone.append(vars(module).pop("_fused"))
            module.__class__ = cast(Any, type(module))._unfused
        for key, child in module._modules.items():
            if child is not None and "_replaced" in vars(child):
                relu = vars(child)["_replaced"].train(child.training)
                undone.append(vars(child)["_fused"])
                module._modules[key] = relu
    for layer in model.modules():
        if isinstance(layer, SampledBatchNorm) and any(vars(layer).get("_fused") is each for each in undone):
            layer.__dict__.pop("_fused")
            layer.activation = None


def _collect(name: str, module: nn.Module, units: dict[nn.Module, str]) -> None:
    if module not in units:
        units[module] = name
        for inner, child in reach(module):
            if not inlined(child):
                _collect(_join(name, inner), child, units)


def _join(name: str, inner: str) -> str:
    return f"{name}.{inner}" if name else inner


def _fuse(
    module: nn.Module,
    name: str,
    owners: Counter[nn.Module],
    skip: Callable[[str, nn.Module], bool],
    notes: list[str],
) -> None:
    """Fuse what the module's own forward calls, or else what each nn.Sequential in it calls."""
    layers: dict[SampledBatchNorm, str] = {
        layer: _join(name, inner)
        for inner, layer in reach(module)
        if isinstance(layer, SampledBatchNorm) and layer.activation is None
    }
    if not layers or skip(name, module):
        return
    title = name or type(module).__name__
    try:
        if type(module) in (nn.ModuleList, nn.ModuleDict):
            raise Untraced
        traced = traces(module)
    except Untraced as error:
        notes += [f"{title}: not traced: {error}"] if error.args else []
        for inner, child in module.named_children():
            if inlined(child):
                _fuse(child, _join(name, inner), owners, skip, notes)
        return

    allowed = {layer for layer, path in layers.items() if not skip(path, layer)}
    (edits, complaints), (others, _) = (
        find(graph, module, allowed, owners) for graph in (traced.train, traced.evaluation)
    )
    notes += [f"{_join(name, inner)}: not fused: {reason}" for inner, reason in complaints.items()]
    swaps = _swaps(edits, traced.train, owners) & _swaps(others, traced.evaluation, owners)
    swapped = {norm for _, norms in swaps for norm in norms}
    rest = [edit for edit in edits if edit.layer not in swapped]
    if rest and not traced.frozen:
        _rewrite(module, traced.train, edits)
        return
    notes += [f"{layers[edit.layer]}: not fused: {traced.frozen}" for edit in rest]
    if swaps and not _swap(module, traced, swaps):
        notes.append(f"{title}: not fused: its forward asks for the types of its layers")


# --- edits ---


def _swaps(
    edits: list[Edit], graph: fx.Graph, owners: Counter[nn.Module]
) -> set[tuple[nn.Module, frozenset[SampledBatchNorm]]]:
    """Return each ReLU module that only fused layers call, and these layers."""
    calls = Counter(node.target for node in graph.find_nodes(op="call_module"))
    groups: dict[nn.Module, list[Edit]] = {}
    for edit in edits:
        if edit.module is not None and edit.add is None and owners[edit.module] == 1:
            groups.setdefault(edit.module, []).append(edit)
    return {
        (relu, frozenset(edit.layer for edit in group))
        for relu, group in groups.items()
        if len(group) == calls[group[0].relu.target]
    }


def _swap(
    module: nn.Module,
    traced: Traces,
    swaps: set[tuple[nn.Module, frozenset[SampledBatchNorm]]],
) -> bool:
    """Put nn.Identity in the place of each ReLU; undo it and return False if that changes what is called."""
    identities, token = {}, object()
    for relu, _ in swaps:
        identities[relu] = nn.Identity().train(relu.training)
        vars(identities[relu]).update(_replaced=relu, _fused=token)  # it is no child
    norms = [norm for _, norms in swaps for norm in norms]
    containers = [module, *(child for _, child in reach(module) if inlined(child))]
    places = [
        (box, key, relu) for box in containers for key, relu in box._modules.items() if relu in identities
    ]
    for box, key, relu in places:
        box._modules[key] = identities[relu]
    try:
        same = traces(module).codes() == traced.codes()
    except Untraced:
        same = False
    for box, key, relu in [] if same else places:
        box._modules[key] = relu
    for norm in norms if same else []:
        norm.activation, norm._fused = "relu", token
    return same


def _rewrite(module: nn.Module, graph: fx.Graph, edits: list[Edit]) -> None:
    token = vars(module).get("_fused", object())
    for edit in edits:
        fused = edit.norm
        if edit.add is not None:
            # Read late: it may be another edit's ReLU, replaced by now.
            residual = next(node for node in edit.add.all_input_nodes if node is not edit.norm)
            with graph.inserting_before(edit.add):
                fused = graph.call_module(str(edit.norm.target), edit.norm.args, {"residual": residual})
        edit.relu.replace_all_uses_with(fused)
        for node in (edit.relu, edit.add, edit.norm):
            if node is not None and node is not fused:
                graph.erase_node(node)
        edit.layer.activation = "relu"
        edit.layer._fused = token
    if isinstance(module, fx.GraphModule):
        module.graph = graph
        module.recompile()
        return
    # Compiled beside stand-ins for the tensors: a class needs the code alone.
    stand_ins: dict[str, Any] = {
        node.target: nn.Module() if node.op == "call_module" else nn.Parameter(torch.empty(0))
        for node in graph.nodes
        if node.op in ("call_module", "get_attr")
    }
    base = getattr(module, "_unfused", type(module))
    vars(module)["_fused"] = token
    module.__class__ = _fused(base, fx.GraphModule(stand_ins, graph, base.__name__))


def _fused(base: type[nn.Module], new: fx.GraphModule) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        # The class has no name that pickle could find: it is made anew.
        _, (_, *args), *state = cast(Any, base).__reduce_ex__(self, max(int(protocol), 2))
        return (_revive, (base, new, *args), *state)

    body = {"forward": type(new).forward, "__reduce_ex__": reduce, "_unfused": base}
    copied = ("__module__", "__qualname__", "__doc__")
    return type(base.__name__, (base,), body | {key: getattr(base, key) for key in copied})


def _revive(base: type[nn.Module], new: fx.GraphModule, *args: Any) -> nn.Module:
    cls = _fused(base, new)
    return cls.__new__(cls, *args)
