"""``python -m sbncore``: what this machine has for sbncore, and a check that it computes right.

It is what a report of a fault should contain. The exit status is 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

DTYPES = "float64", "float32", "float16", "bfloat16"
LAYOUTS = {"first": ("channels_first", "short_maps"), "last": ("channels_last",)}


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m sbncore", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    warmup = parser.add_subparsers(dest="command").add_parser(
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
    options = parser.parse_args(arguments)
    if options.command == "warmup":
        compile_ahead(options)
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
