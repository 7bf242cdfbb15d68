"""The package as users get it: a wheel, an editable install, a bare checkout."""

import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

OBJECT = "sbncore/cpu/objects/linux-x86-64-v3-0123/map_places.o"

needs_build = pytest.mark.skipif(
    not all(map(find_spec, ("pip", "setuptools", "wheel"))),
    reason="building needs pip, setuptools and wheel: pip install -e '.[test]'",
)


def pip(*args: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def imported_from(path: Path) -> list[Path]:
    """The files of `sbncore` and `sbncore.adapters` when `path` is the only site folder.

    -I and -S hide an sbncore installed in this environment, so NumPy is handed over by its path.
    """
    code = (
        "import site, sys;"
        f"sys.path.append({str(Path(np.__file__).parents[1])!r}); import numpy; sys.path.pop();"
        f"site.addsitedir({str(path)!r}); import sbncore, sbncore.adapters;"
        "print(sbncore.__file__, sbncore.adapters.__file__, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Path(line).resolve() for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the package is made of, so that a build leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("sbncore", "adapters"):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "objects")
        )
    compiled = copy / OBJECT
    compiled.parent.mkdir(parents=True)
    compiled.write_bytes(b"object code")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout)
    [path] = folder.glob("*.whl")
    return path


@needs_build
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.partition("/")[0] for name in names}
    assert top == {"sbncore", next(n for n in top if n.endswith(".dist-info"))}

    # setup.cfg lists the packages: one forgotten there is missing here.
    sources = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in (("sbncore", "sbncore"), ("adapters", "sbncore/adapters"))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cu", ".typed") and "__pycache__" not in path.parts
    }
    assert {"sbncore/adapters/__init__.py", "sbncore/py.typed"} <= sources <= names
    assert OBJECT in names


@needs_build
def test_unpacked_wheel_imports(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert imported_from(tmp_path) == [
        tmp_path / "sbncore/__init__.py",
        tmp_path / "sbncore/adapters/__init__.py",
    ]


@needs_build
def test_editable_install_imports(checkout, tmp_path):
    pip("install", "--no-deps", "--no-build-isolation", "--target", tmp_path, "-e", checkout)
    assert imported_from(tmp_path) == [
        checkout / "sbncore/__init__.py",
        checkout / "adapters/__init__.py",
    ]


def test_bare_checkout_imports():
    assert imported_from(ROOT) == [
        ROOT / "sbncore/__init__.py",
        ROOT / "adapters/__init__.py",
    ]
