"""``python -m sbncore warmup``: compile the CPU's kernels before they are needed."""

from __future__ import annotations

import argparse
from pathlib import Path

LAYOUTS = {"first": ("channels_first", "short_maps"), "last": ("channels_last",)}


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    from sbncore.cpu import ahead, kernels
    from sbncore.cpu.kernels import DTYPES, names

    parser = argparse.ArgumentParser(prog="python -m sbncore", description=__doc__)
    warmup = parser.add_subparsers(required=True, metavar="warmup").add_parser(
        "warmup", description="Compile the CPU's kernels ahead: about a minute for each dtype and layout."
    )
    dtypes, layouts = tuple(DTYPES), tuple(LAYOUTS)
    warmup.add_argument("--dtype", nargs="+", choices=dtypes, default=["float32"], help="default: float32")
    warmup.add_argument("--layout", nargs="+", choices=layouts, default=layouts, help="default: both")
    warmup.add_argument("--cpu", nargs="+", metavar="NAME", help="LLVM's names; default: this CPU")
    warmup.add_argument("--folder", type=Path, help="default: the cache")
    options = parser.parse_args(arguments)
    memories = [memory for layout in options.layout for memory in LAYOUTS[layout]]
    wanted = names(memories, options.dtype)
    for cpu in [(name, "") for name in options.cpu or ()] or [kernels.cpu()]:
        folder = (options.folder or kernels.cache_folder()) / kernels.folder_name(*cpu)
        folder.mkdir(parents=True, exist_ok=True)
        ahead.fill(folder, wanted, cpu)
        print(f"{len(wanted)} kernels for {cpu[0]} in {folder}")


if __name__ == "__main__":
    main()
