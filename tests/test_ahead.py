"""Kernels as object code: what it needs, where it is found, and who compiles it."""

import ctypes
import re
import struct
import sys
import threading
import time
from pathlib import Path

import pytest
from test_start import python

import sbncore.cpu
from sbncore import __main__
from sbncore.cpu import ahead, kernels
from sbncore.cpu.kernels import DRAWS, names

CALL = """
import sys
import numpy as np
import sbncore as sbn

x = np.random.default_rng(0).normal(size=(6, 5, 20, 16)).astype(np.float32)
y, saved = sbn.forward(x, plan=sbn.FeatureSampling(1 / 4).plan(x.shape))
dx = sbn.backward(y, saved).x
print(float(y.sum()), float(dx.sum()), "numba" in sys.modules)
"""
USED = "map_places", "whole_samples", "channels_first-forward-float32", "channels_first-backward-float32"


def undefined(code):
    """The names that an object in ELF leaves to the process that loads it."""
    from llvmlite import binding

    sections = {s.name(): s.data() for s in binding.ObjectFileRef.from_data(code).sections()}
    strings, found = sections[b".strtab"], set()
    for name, _, _, section, _, _ in struct.iter_unpack("<IBBHQQ", sections[b".symtab"]):
        if name and section == 0:
            found.add(strings[name : strings.index(b"\0", name)].decode())
    return found


@pytest.fixture(scope="module")
def everything():
    """Compile what is missing at once, on every core: one by one it takes four times as long."""
    kernels.functions(*names())


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
@pytest.mark.parametrize("name", names())
def test_an_object_needs_the_c_library_alone(everything, name):
    assert undefined(kernels._file(name).read_bytes()) <= {"memset", "memcpy", "memmove", "sched_yield"}


def test_a_process_that_finds_its_kernels_loads_no_numba():
    kernels.functions(*USED)
    assert python(CALL).endswith(" False")


def test_shipped_objects_need_no_cache(tmp_path):
    kernels.functions(*USED)
    shipped = tmp_path / "objects" / kernels.folder_name(kernels.cpu()[0])
    shipped.mkdir(parents=True)
    for name in USED:
        (shipped / f"{name}.o").write_bytes(kernels._file(name).read_bytes())
    (tmp_path / "file").touch()
    code = f"""
import pathlib, warnings
from sbncore.cpu import kernels
kernels.SHIPPED = pathlib.Path({str(shipped.parent)!r})
warnings.simplefilter("error")
{CALL}"""
    assert python(code, SBNCORE_CACHE_DIR=str(tmp_path / "file")) == python(CALL)


def test_a_cpu_takes_the_best_objects_that_it_can_run(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SHIPPED", tmp_path)
    monkeypatch.delenv("NUMBA_CPU_NAME", raising=False)
    for name in ("x86-64-v3", "x86-64-v4", "some"):
        (tmp_path / kernels.folder_name(name)).mkdir()
    v3 = ",".join(f"+{one}" for one in kernels.V3)
    v4 = ",".join(f"+{one}" for one in kernels.LEVELS["x86-64-v4"])
    for host, wanted in (
        (("other", v4), ["x86-64-v4", "x86-64-v3"]), (("other", v3), ["x86-64-v3"]),
        (("some", v3), ["some", "x86-64-v3"]), (("other", v3.replace("+fma", "-fma")), []),
    ):  # fmt: skip
        monkeypatch.setattr(kernels, "cpu", lambda host=host: host)
        found = kernels.places.__wrapped__()
        assert found == [*(tmp_path / kernels.folder_name(each) for each in wanted), found[-1]]
    monkeypatch.setenv("NUMBA_CPU_NAME", "some")
    monkeypatch.setattr(kernels, "cpu", lambda: ("some", v4))
    assert kernels.places.__wrapped__()[:-1] == [tmp_path / kernels.folder_name("some")]


def test_another_source_is_another_folder(monkeypatch, tmp_path):
    for file in Path(sbncore.cpu.__file__).parent.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = kernels.folder_name("some")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    assert kernels.folder_name("some") == before != kernels.folder_name("some", "+feature")
    for name, same in (("engine.py", True), ("rows.py", False)):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        assert (kernels.folder_name("some") == before) == same


@pytest.fixture
def compilations(monkeypatch):
    """What was compiled, in words; it takes a moment."""
    asked = []

    def compile_slowly(folder, names, cpu, tell):
        asked.append(names)
        for _ in range(10):
            time.sleep(0.02)
            tell()
        for name in names:
            (folder / f"{name}.o").touch()

    monkeypatch.setattr(ahead, "_compile", compile_slowly)
    return asked


def test_one_process_compiles_and_the_others_wait(tmp_path, compilations):
    wanted, cpu = (["a", "b"], ["a", "b"], ["b", "c"]), ("some", "")
    many = [threading.Thread(target=ahead.fill, args=(tmp_path, each, cpu)) for each in wanted]
    for one in many:
        one.start()
    for one in many:
        one.join()
        assert not one.is_alive()
    assert sorted(name for each in compilations for name in each) == ["a", "b", "c"]


@pytest.mark.parametrize("patience", [0.1, 60])
def test_after_a_second_the_user_is_told_once(tmp_path, compilations, monkeypatch, capsys, patience):
    monkeypatch.setattr(ahead, "PATIENCE", patience)
    ahead.fill(tmp_path, ["a", "b"], ("some", ""))
    said = capsys.readouterr().err
    if patience == 60:
        assert said == ""
    else:
        wanted = r"sbncore: compiling 2 functions for the CPU 'some', about \d+ s\. It happens once, .*\n"
        assert re.fullmatch(wanted, said) and str(tmp_path) in said and "python -m sbncore warmup" in said


def test_a_failure_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"compiling the CPU's kernels failed(.|\n)*nonsense"):
        ahead.fill(tmp_path, ["nonsense-forward-float32"], kernels.cpu())


def test_processes_compile_what_is_asked(tmp_path):
    ahead.fill(tmp_path, [*DRAWS], kernels.cpu())
    assert {file.name for file in tmp_path.iterdir()} == {"map_places.o", "whole_samples.o", "lock"}


def test_warmup_compiles_by_dtype_layout_and_cpu(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(ahead, "fill", lambda *arguments: asked.append(arguments))
    options = "--dtype float16 --layout last --cpu a b --folder".split()
    __main__.main(["warmup", *options, str(tmp_path)])
    assert [folder for folder, _, _ in asked] == [tmp_path / kernels.folder_name(cpu) for cpu in "ab"]
    for folder, wanted, cpu in asked:
        assert folder.is_dir() and cpu in (("a", ""), ("b", ""))
        assert set(wanted) == {*DRAWS, *names(("channels_last",), ("float16",))} and len(wanted) == 2 + 9
    assert capsys.readouterr().out.count("11 kernels for") == 2
    asked.clear()
    monkeypatch.setenv("SBNCORE_CACHE_DIR", str(tmp_path))
    __main__.main(["warmup"])
    folder = tmp_path / kernels.folder_name(*kernels.cpu())
    assert asked == [(folder, names(dtypes=("float32",)), kernels.cpu())]


def test_functions_of_one_name_in_two_objects_stay_apart(tmp_path, monkeypatch):
    """Numba numbers anew in each process what it compiles, so that objects of two share names."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(opt=0)
    for value, name in enumerate(("first", "second")):
        module = binding.parse_assembly(f"""
            define linkonce_odr i64 @inner() noinline {{ ret i64 {value} }}
            define void @{name}(i64* %result) {{
                %value = call i64 @inner()
                store i64 %value, i64* %result
                ret void
            }}""")
        (tmp_path / f"{name}.o").write_bytes(machine.emit_object(module))
    monkeypatch.setattr(kernels, "_file", lambda name: tmp_path / f"{name}.o")
    monkeypatch.setattr(kernels, "loaded", {})
    found = []
    for name in ("first", "second"):
        result = ctypes.c_int64(-1)
        kernels._load(name)(ctypes.addressof(result))
        found.append(result.value)
    assert found == [0, 1]
