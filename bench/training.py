"""Networks trained on real images with full and sampled statistics: accuracy, convergence, cost.

A suite is a standard experiment; options change it. Every finished training is a line of
OUT/training-SUITE.jsonl, so that a stopped sweep goes on where it was; the tables and the picture beside it
are made anew of what the file holds.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace

import sbncore as sbn
from bench import report
from bench.cases import WrongResult
from bench.machine import Machine, machine, set_threads
from bench.options import BadData, expect, integer, parser

try:
    import torch

    from bench import curves, normalizations, speed
    from bench.networks import NETWORKS, build, torchvisions
    from bench.suites import REFERENCE_BATCH, SUITES, Suite
    from bench.sweep import DEFAULT, Spec, dataset, sweep
    from bench.trainee import Settings, check
except ImportError:  # main says so
    torch = None


def main(arguments: list[str]) -> None:
    if torch is None:
        sys.exit("training needs PyTorch, which is not installed: pip install torch")
    options = _options(arguments)
    try:
        (_speed if options.speed else _sweep)(options, arguments)
    except BadData as bad:
        sys.exit(str(bad))
    except WrongResult as wrong:
        sys.exit(f"wrong result, nothing is timed: {wrong}")


def _machine(options: argparse.Namespace, threads: int) -> Machine:
    """Set the threads; return where they are."""
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        sys.exit("--device cuda: expected a CUDA device, PyTorch finds none")
    set_threads(threads)
    return machine(torch.cuda.get_device_name() if gpu else "")


def _speed(options: argparse.Namespace, arguments: list[str]) -> None:
    where = _machine(options, options.threads or sbn.get_num_threads())
    settings = Settings(
        batch=(options.batches or [64])[0],
        device=options.device,
        channels_last=options.channels_last,
        autocast=options.autocast,
    )
    rounds = options.rounds or (10 if options.quick else 40)
    network, *others = options.networks or ["resnet"]
    _choices("--networks", (network,), (*NETWORKS, *torchvisions()))
    if others:
        sys.exit(f"--networks: expected one with --speed, got {len(others) + 1}")
    speed.run(settings, rounds, network, where, arguments, options.out)


def _sweep(options: argparse.Namespace, arguments: list[str]) -> None:
    suite, out = _suite(options), options.out
    data = dataset(options.data or DEFAULT)
    images = min(suite.images, len(data.x)) if options.images is None else suite.images
    most = f"--images: expected at most the {len(data.x)} of {data.name}, got {images}"
    expect(images <= len(data.x), most)
    batch = max(suite.batches)
    expect(batch <= images, f"--batches: expected at most the {images} images there are, got {batch}")
    data.subset(images)
    jobs = options.jobs or (1 if options.device == "cuda" else sbn.get_num_threads())
    where = _machine(options, options.threads or 1)
    x, _ = Settings(device=options.device).tensors(data.x[:64], data.labels[:64])
    for network in suite.networks:
        check(build(network, x.shape[1], data.classes, 0).to(options.device), x, 0)
    stem = f"training-{'quick' if options.quick else options.suite}"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    runs = sweep(
        _specs(suite, options.data or (DEFAULT if data.name == DEFAULT else "digits"), images),
        out and out / f"{stem}.jsonl",
        jobs=jobs,
        threads=where.threads,
        device=options.device,
        where=", ".join(filter(None, [where.gpu, where.cpu])),
    )
    size = "×".join(map(str, data.x.shape[2:]))
    about = f"{suite.about}: {data.name}, {images:,} images of {size}, {suite.epochs} epochs"
    said = report.about(where, "training", arguments, f"{about}, {jobs} trainings at a time.")
    report.publish(
        out,
        stem,
        suite.about,
        curves.report(runs, said),
        where,
        draw=lambda figure: curves.draw(figure, runs, about),
    )


def _suite(options: argparse.Namespace) -> Suite:
    """Return the suite as the options change it; exit where they name what there is not."""
    suite = SUITES["quick" if options.quick else options.suite]
    asked = ("norms", "networks", "gradients", "batches", "seeds", "images", "epochs", "rates")
    suite = replace(suite, **{k: getattr(options, k) for k in asked if getattr(options, k) is not None})
    _choices("--networks", suite.networks, tuple(NETWORKS))
    _choices("--gradients", suite.gradients, ("exact", "sampled", "detached"))
    for norm in suite.norms:
        if norm not in normalizations.ALTERNATIVES:
            try:
                normalizations.sampler(norm, max(suite.batches))
            except ValueError as wrong:
                sys.exit(f"--norms: {wrong}")
    return suite


def _specs(suite: Suite, data: str, images: int) -> list[Spec]:
    """Return the suite's trainings, all of one seed before the next."""
    return [
        Spec(
            network,
            data,
            images,
            suite.epochs,
            batch,
            rate * batch / REFERENCE_BATCH,
            norm,
            gradient,
            seed,
        )
        for seed in range(suite.seeds)
        for network in suite.networks
        for rate in suite.rates
        for batch in suite.batches
        for gradient in suite.gradients
        for norm in suite.norms
        if gradient == "exact" or _has_gradients(norm)
    ]


def _has_gradients(norm: str) -> bool:
    """Whether a choice of gradients matters: not without a sample, and virtual samples refuse "sampled"."""
    return norm not in (*normalizations.ALTERNATIVES, "full") and "vdn" not in norm


def _choices(option: str, got: tuple[str, ...], known: tuple[str, ...]) -> None:
    for each in got:
        if each not in known:
            sys.exit(f"{option}: expected {', '.join(known)}, got {each!r}")


def _options(arguments: list[str]) -> argparse.Namespace:
    one = parser("training", __doc__, "a few minutes: the suite quick")
    one.epilog, add = normalizations.__doc__, one.add_argument
    add("--suite", choices=SUITES, default="accuracy", help="default: accuracy")
    swept = [
        add("--norms", type=_words, help="names as below, separated by commas"),
        add("--gradients", type=_words, help="exact, sampled, detached"),
        add("--seeds", type=integer, help="how many"),
        add("--images", type=integer, help="how many to train on, of every class its share"),
        add("--epochs", type=integer),
        add("--rates", type=_rates, help="learning rates for a batch of 128"),
        add("--data", metavar="FOLDER", help="IDX files, CIFAR-10's, train/CLASS/*; or digits"),
        add("--jobs", type=integer, help="trainings at a time; default: as many as cores"),
    ]
    add("--networks", type=_words, help="plain, resnet, 1d; with --speed one, of torchvision's too: resnet50")
    add("--batches", type=_numbers, help="batch sizes")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=integer, help="of each; default: 1, or with --speed all cores")
    add(
        "--speed",
        action="store_true",
        help="only the time of a step, of random images, and normalization's share of it",
    )
    add("--channels-last", action="store_true", help="with --speed")
    add("--autocast", choices=("float16", "bfloat16"), help="with --speed")
    add("--rounds", type=integer, help="steps of each, with --speed; default: 40")
    options = one.parse_args(arguments)
    if not options.speed and (options.rounds or options.channels_last or options.autocast):
        one.error("--rounds, --channels-last and --autocast need --speed")
    for each in swept:
        if options.speed and getattr(options, each.dest) is not None:
            one.error(f"--{each.dest} is not for --speed, which trains on random images")
    return options


def _words(text: str) -> tuple[str, ...]:
    return tuple(each.strip() for each in text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(integer, _words(text)))


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(map(float, _words(text)))
    if not all(0 < rate < math.inf for rate in rates):
        raise argparse.ArgumentTypeError(f"expected positive numbers, got {text!r}")
    return rates
