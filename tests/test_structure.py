"""The package's structure, read from its source: what is imported on loading, how long argument lists are."""

import ast
from collections.abc import Iterator

from test_imports import MODULES

MOST = 8  # parameters, self not counted

KERNELS = {
    f"sbncore.cpu.{name}"
    for name in (
        "channels_first", "channels_last", "short_maps", "rows", "segments", "per_channel", "runs", "vectors",
        "elements", "tasks",
    )
}  # fmt: skip  # Numba's functions: a record as a parameter costs them more than its fields do

# Each function that takes more, and why.
PUBLIC = "public: options are keyword-only"
LAYER = "a layer's constructor: torch's arguments, and options"
AUTOGRAD = "an autograd function: torch passes tensors singly"
OPERATOR = "an operator: its schema takes no records"
LONG = {
    "sbncore.functional.forward": PUBLIC,
    "sbncore.functional.normalize": PUBLIC,
    "sbncore.gradients.check_gradients": PUBLIC,
    "sbncore.training.batch_norm": PUBLIC,
    "sbncore.adapters.jax.function.batch_norm": PUBLIC,
    "sbncore.adapters.torch.convert.convert_sampled_batchnorm": PUBLIC,
    "sbncore.adapters.numpy.SampledBatchNorm.__init__": LAYER,
    "sbncore.adapters.torch.layers.SampledBatchNorm.__init__": LAYER,
    "sbncore.adapters.torch.function.BatchNorm.forward": AUTOGRAD,
    "sbncore.adapters.torch.ranks.BatchNormOverRanks.forward": AUTOGRAD,
    "sbncore.adapters.torch.ops._forward": OPERATOR,
    "sbncore.adapters.torch.ops._fake_forward": OPERATOR,
    "sbncore.adapters.torch.ops._backward": OPERATOR,
    "sbncore.adapters.torch.ops._fake_backward": OPERATOR,
}  # fmt: skip

# What an adapter may import of the package, beside its public names: the way to a Call, and values.
DOORS = {
    "arguments", "arrays", "call", "checks", "dlpack", "drawing", "estimates", "hashing", "layout", "noise",
    "plans", "residuals", "samplers", "saved", "signature", "statistics", "views",
}  # fmt: skip
CUPY = "sbncore.cuda.device"  # whose `cupy` says what is missing, where CuPy is

# What imports nothing of the way to a call; that way; and who imports an engine's modules, and which.
BELOW = {
    "arrays", "checks", "drawing", "hashing", "interchange", "layout", "noise", "plans",
    "statistics", "views",
}  # fmt: skip
ABOVE = {
    "arguments", "call", "estimates", "functional", "gradients", "residuals", "run", "saved", "signature",
    "training",
}  # fmt: skip
ENGINES = {
    "call": {"cpu.call", "cpu.engine", "cuda.call"},
    "arrays": {"cuda", "cuda.device"},
    "__init__": {"cpu.threads"},
    "__main__": {"cpu"},
    "environment": {"cpu", "cuda.device"},
}  # fmt: skip


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    """The functions and methods under a node, by their full names, each with its number of parameters."""
    for node in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{node.name}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = node.args
            taken = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            yield name, sum(one is not None and one.arg not in ("self", "cls") for one in taken)
        yield from functions(node, name)


def parsed(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def test_functions_take_few_parameters():
    counts = {k: n for name in MODULES if name not in KERNELS for k, n in functions(parsed(name), name)}
    assert {name for name, count in counts.items() if count > MOST} == LONG.keys()


def test_long_public_functions_take_options_by_name():
    for name in (name for name, why in LONG.items() if why is PUBLIC):
        module, function = name.rsplit(".", 1)
        args = next(
            node.args
            for node in parsed(module).body
            if isinstance(node, ast.FunctionDef) and node.name == function
        )
        assert len(args.posonlyargs) + len(args.args) <= MOST and args.kwonlyargs and args.vararg is None


def test_adapters_import_the_call_and_public_names_only():
    for name in MODULES:
        if not name.startswith("sbncore.adapters"):
            continue
        for node in ast.walk(parsed(name)):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            for one in node.names if node.module == "sbncore" else [None]:
                module = node.module if one is None else f"sbncore.{one.name}"
                inside = module.startswith("sbncore.") and not module.startswith("sbncore.adapters")
                if inside and module in MODULES and module.removeprefix("sbncore.") not in DOORS:
                    assert (name, module) == ("sbncore.adapters.cupy", CUPY)


def test_nothing_in_the_package_imports_an_adapter():
    for name in MODULES:
        modules = [str(node.module) for node in ast.walk(parsed(name)) if isinstance(node, ast.ImportFrom)]
        inside = name.startswith("sbncore.adapters") or name == "sbncore.__main__"  # a program, above all
        assert inside or not any(module.startswith("sbncore.adapters") for module in modules)


def test_arrays_load_no_engine():
    tree = parsed("sbncore.arrays")
    loaded = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or node.names[0].name for node in loaded}
    assert not {name for name in modules if name.startswith(("sbncore.cpu", "sbncore.cuda"))}
    late = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node not in loaded]
    assert {node.module for node in late} <= {"sbncore.cuda", "sbncore.cuda.device"}  # CuPy's arrays


def imported(name: str) -> set[str]:
    """The package's modules that one imports, anywhere in it."""
    nodes = [node for node in ast.walk(parsed(name)) if isinstance(node, ast.ImportFrom) and node.module]
    modules = {str(node.module) for node in nodes}
    modules |= {f"sbncore.{one.name}" for node in nodes if node.module == "sbncore" for one in node.names}
    return {each.removeprefix("sbncore.") for each in modules if each.startswith("sbncore.")}


def test_imports_go_one_way():
    for name in MODULES:
        short = name.removeprefix("sbncore.")
        if short in BELOW:
            assert not imported(name) & ABOVE, name
        if short.startswith(("cpu.", "cuda.")):
            assert not imported(name) & (ABOVE - {"signature", "saved"}), name
    assert not imported("sbncore.reference")


def test_engines_are_imported_by_the_call():
    for name in MODULES:
        short = "__init__" if name == "sbncore" else name.removeprefix("sbncore.")
        if not short.startswith(("cpu", "cuda", "adapters")):
            engines = {each for each in imported(name) if each.partition(".")[0] in ("cpu", "cuda")}
            assert engines == ENGINES.get(short, set()), name
