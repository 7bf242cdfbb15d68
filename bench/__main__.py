"""``python -m bench NAME ...`` runs bench/NAME.py; each says with ``--help`` what it takes."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "layer": "one BN layer: checked, then timed against a copy, NumPy and PyTorch (10 min; --quick 1)",
    "training": "networks trained by PyTorch on real images, full and sampled statistics (hours; --quick 2)",
    "ensemble": "many copies of a network trained at once: tenths of a point (5 min on a GPU; --quick 1)",
    "fidelity": "how near each sampler's estimates come on real activations, layer by layer (3 min)",
    "overhead": "what a call costs beside its kernels (1 min)",
    "targets": "the CPU engine against its goals, shape by shape (15 min)",
    "demo": "a small network trained in NumPy with each sampler: make demo (1 min)",
    "start": "imports and first calls on the CPU, with and without compiled kernels (3 min)",
    "kernels": "what every CUDA kernel needs of a GPU, compiled without one (2 min)",
}


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in BENCHMARKS:
        listing = "".join(f"\n  {name:<10}{what}" for name, what in BENCHMARKS.items())
        wanted = f"usage: python -m bench NAME [options], NAME one of{listing}"
        if arguments and arguments[0] in ("-h", "--help"):
            print(wanted)
            return
        sys.exit(wanted if not arguments else f"{wanted}\ngot {arguments[0]!r}")
    importlib.import_module(f"bench.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
