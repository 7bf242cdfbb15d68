"""The standard experiments: what is trained, and how."""

from __future__ import annotations

from dataclasses import dataclass

from bench.normalizations import BATCH_NORM, BATCH_RENORM, GROUP_NORM

RATIOS = 4, 8, 16, 32, 64
SAMPLED = (
    "fs/{0}", "fs-runs/{0}", "fs-runs/{0}@1024", "fs-grid/{0}", "fs-common/{0}", "bs/{0}", "ns/{0}",
    "vdn/{0}", "bs/{1}+vdn/{1}", "fs/{1}+vdn/{1}",
)  # fmt: skip
REFERENCE_BATCH = 128  # the rate is per so many images: it shrinks with the batch


@dataclass(frozen=True)
class Suite:
    """Every normalization, at every batch size and rate, with every gradient and seed, on every network."""

    about: str
    norms: tuple[str, ...]
    networks: tuple[str, ...] = ("plain",)
    gradients: tuple[str, ...] = ("exact",)
    batches: tuple[int, ...] = (128,)
    seeds: int = 3
    images: int = 20_000
    epochs: int = 2
    rates: tuple[float, ...] = (0.2,)


SUITES = {
    "accuracy": Suite(
        "Every sampler at every ratio",
        ("full", *(name.format(r, 2 * r) for name in SAMPLED for r in RATIOS)),
    ),
    "fs": Suite(
        "Feature sampling, more seeds",
        ("full", *(name.format(r) for name in (*SAMPLED[:3], "fs-runs/{0}@2048") for r in (16, 32, 64))),
        seeds=10,
    ),
    "bs": Suite(
        "Batch sampling with a floor, more seeds",
        ("full", "bs/16", "bs/16@1024", "bs/16@2048", "bs/16@4096", "bs/32@2048", "bs/64@2048"),
        seeds=10,
    ),
    "networks": Suite(
        "Other networks",
        ("full", "fs/16", "fs-runs/16", "fs-runs/64", "fs-runs/16@1024", "fs-runs/64@1024"), ("resnet", "1d"),
    ),
    "tiny": Suite(
        "Tiny batches",
        (
            "full", "vdn:4", "vdn:16", "0.5*full+0.5*vdn:4", "0.8*full+0.2*vdn:4", "fs/4+vdn:4",
            "prior:0.5|full", "prior:0.9|full", GROUP_NORM, BATCH_RENORM,
        ),
        batches=(1, 2, 4, 8, 32), images=6000, epochs=1,
    ),
    "rates": Suite(
        "Tiny batches at other rates", ("full", "vdn:4", GROUP_NORM),
        batches=(1, 2, 4, 32), images=6000, epochs=1, rates=(0.2, 0.4, 0.8),
    ),
    "gradients": Suite(
        "Exact, sampled and detached gradients",
        (
            "full", "fs/16", "fs-runs/16", "fs-runs/16@1024", "fs-runs/16@8192", "fs-grid/16", "bs/16",
            "ns/16",
        ),
        gradients=("exact", "sampled", "detached"),
    ),
    "quick": Suite(
        "A quick look", (BATCH_NORM, "full", "fs/16", "bs/16", "vdn/16"), images=6000, epochs=1, seeds=2
    ),
}  # fmt: skip
