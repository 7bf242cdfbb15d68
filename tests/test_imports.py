"""What `import sbncore` loads, what it costs, and which way imports go."""

import ast
import graphlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAZY = ("numba", "llvmlite", "cupy", "torch", "jax", "scipy")


def python(code: str, **env: str) -> str:
    """Run `code` in an interpreter of its own and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_framework():
    loaded = python(f"import sys, sbncore; print([m for m in {LAZY} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_import_is_quick():
    code = "import numpy, time; t = time.perf_counter(); import sbncore"
    code += "; print(time.perf_counter() - t)"
    assert statistics.median(float(python(code)) for _ in range(5)) < 0.3


# Imports go one way. Read from the source, so that imports inside functions count too.


def modules() -> dict[str, Path]:
    """Every module of the package by name, the adapters under their packaged name."""
    found = {}
    for folder, package in (("sbncore", "sbncore"), ("adapters", "sbncore.adapters")):
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "sbncore" and inner[0] == "adapters":
                continue  # the symlink
            found[".".join((package, *inner)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules that module `name` imports, absolute, wherever in it the statement stands."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("name", MODULES)
def test_layers(name):
    used = set(imports(name))
    if not within(name, "sbncore.adapters") and name != "sbncore.__main__":  # a program, above all
        assert not [m for m in used if within(m, "sbncore.adapters")]
    if not within(name, "sbncore.cpu"):
        assert not [m for m in used if within(m, "numba") or within(m, "llvmlite")]
    if name == "sbncore.reference":
        assert {m.partition(".")[0] for m in used} - sys.stdlib_module_names <= {"numpy"}


def test_no_cycles():
    graph = {name: {m for m in imports(name) if m in MODULES} - {name} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules
