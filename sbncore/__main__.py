"""``python -m sbncore``: what this machine has for sbncore, and a check that it computes right.

It is what a report of a fault should contain. The exit status is 1 where something is wrong. There are two
more commands: ``warmup`` compiles the CPU's kernels, ``suggest`` finds samplers for a model.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path

DTYPES = "float64", "float32", "float16", "bfloat16"
LAYOUTS = {"first": ("channels_first", "short_maps"), "last": ("channels_last",)}


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m sbncore", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    commands = parser.add_subparsers(dest="command")
    warmup = commands.add_parser(
        "warmup",
        help="compile the CPU's kernels before they are needed",
        description="Compile the CPU's kernels ahead: about a minute for each dtype and layout.",
    )
    layouts = tuple(LAYOUTS)
    add = warmup.add_argument
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="default: float32")
    add("--layout", nargs="+", choices=layouts, default=layouts, help="default: both")
    add("--cpu", nargs="+", metavar="NAME", help="LLVM's names; default: this CPU")
    add("--folder", type=Path, help="default: the cache")
    suggest = commands.add_parser(
        "suggest",
        help="a sampler for each layer of a PyTorch model, and why",
        description="Which sampler each BatchNorm layer of a PyTorch model can do with.",
    )
    add = suggest.add_argument
    add("model", metavar="FILE.py:FUNCTION", help="it returns the model, or (model, batch of training data)")
    add("--input", type=sizes, metavar="N,C,H,W", help="without a batch: of white noise, which is no data")
    add("--tolerance", type=float, default=0.03, help="in standard deviations; default: 0.03")
    add("--json", action="store_true", help="all that was tried, as JSON")
    add("--traceback", action="store_true", help="where an error arose")
    add("--picture", metavar="FILE", help="error over passes, as PNG, SVG or PDF")
    options = parser.parse_args(arguments)
    if options.command == "warmup":
        compile_ahead(options)
    elif options.command == "suggest":
        suggest_samplers(options)
    else:
        tell(options.json)


def compile_ahead(options: argparse.Namespace) -> None:
    """Fill a folder with the object code of kernels."""
    from sbncore.cpu import ahead, kernels

    memories = [memory for layout in options.layout for memory in LAYOUTS[layout]]
    wanted = kernels.names(memories, options.dtype)
    for cpu in [(name, "") for name in options.cpu or ()] or [kernels.cpu()]:
        folder = (options.folder or kernels.cache_folder()) / kernels.folder_name(*cpu)
        folder.mkdir(parents=True, exist_ok=True)
        ahead.fill(folder, wanted, cpu)
        print(f"{len(wanted)} kernels for {cpu[0]} in {folder}")


def sizes(text: str) -> tuple[int, ...]:
    """Return a shape that is written as 32,3,224,224."""
    shape = tuple(map(int, text.split(",")))
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected N,C and the spatial sizes, got {text!r}")
    return shape


def suggest_samplers(options: argparse.Namespace) -> None:
    """Print what `sbncore.adapters.torch.suggest_samplers` finds of the model that a function builds."""
    file, _, function = options.model.rpartition(":")
    if not Path(file).is_file():
        sys.exit(f"model: expected FILE.py:FUNCTION, got {options.model!r}")
    sys.path.insert(0, str(Path(file).resolve().parent))  # as for a script
    build = runpy.run_path(file).get(function)
    if not callable(build):
        sys.exit(f"model: expected a function {function!r} in {file}, found none")
    try:
        from sbncore.adapters import torch as adapter
    except ImportError as missing:
        sys.exit(str(missing))
    built = build()
    model, batch = built if isinstance(built, tuple) else (built, None)
    if batch is None:
        if options.input is None:
            sys.exit("--input: expected a shape, since the function returns no batch")
        import torch

        batch = torch.randn(options.input, generator=torch.Generator().manual_seed(0))
        print("of white noise: real data are correlated, and want more", file=sys.stderr)
    try:
        found = adapter.suggest_samplers(model, batch, tolerance=options.tolerance)
    except (TypeError, ValueError) as complaint:
        if options.traceback:
            raise
        sys.exit(f"{complaint}; --traceback says where")
    print(json.dumps(found.as_dict(), indent=2) if options.json else found)
    if options.picture:
        found.picture(options.picture)


def tell(as_json: bool) -> None:
    """Print the environment and the checks; exit with 1 where one fails."""
    from sbncore.environment import checks, environment

    found, checked = environment(), dict[str, str]()
    if not as_json:
        print("\n".join(f"{name:<24}{value}" for name, value in found.items()), "\n")
    for what, result in checks():
        checked[what] = result
        if not as_json:
            print(f"{what:<32}{result}")
    wrong = [what for what, result in checked.items() if "is off" in result]
    if as_json:
        print(json.dumps({"environment": found, "checks": checked, "ok": not wrong}, indent=2))
    else:
        print(f"\nwrong: {', '.join(wrong)}" if wrong else "\nok")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
