"""Trainings, side by side; each that is finished is a line of a file, and is not run again."""

from __future__ import annotations

import datetime
import json
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.data import Images, load
from bench.machine import set_threads
from bench.networks import build
from bench.normalizations import normalized
from bench.options import BadData
from bench.trainee import Settings, Trainee, accuracy, share

DEFAULT = "Fashion-MNIST"  # where Debian puts it
POINTS = 40  # of a curve of losses
TESTS = 8  # times that accuracy is looked at, the last with all images
FEW = 2000  # images that the others look at
PROFILED = 6  # steps


@dataclass(frozen=True)
class Spec:
    """What a training's result depends on."""

    network: str
    data: str  # a name or a folder
    images: int
    epochs: int
    batch: int
    rate: float
    norm: str
    gradient: str
    seed: int
    subset: str = "stratified"  # of the images; lines from before it have "first"


@dataclass(frozen=True)
class Run:
    """A finished training."""

    spec: Spec
    accuracy: float
    losses: tuple[float, ...]  # means over equal parts of the steps
    accuracies: tuple[tuple[int, float], ...]  # (steps taken, accuracy)
    share: float  # of a step's time, that normalization takes
    step_ms: float  # median; of runs side by side only the shares compare
    where: str
    date: str

    @property
    def steps(self) -> int:
        return self.accuracies[-1][0]

    def line(self) -> str:
        """Return it as a line of JSON."""
        flat = asdict(self)
        return json.dumps(flat.pop("spec") | flat, ensure_ascii=False)

    @staticmethod
    def of(line: str) -> Run:
        """Return what a line says."""
        flat = json.loads(line)
        flat.setdefault("subset", "first")
        spec = Spec(**{field.name: flat.pop(field.name) for field in fields(Spec)})
        flat["accuracies"] = tuple(tuple(pair) for pair in flat["accuracies"])
        return Run(spec, **flat | {"losses": tuple(flat["losses"])})


def finished(path: Path) -> list[Run]:
    """Return the runs of a file; a last line that was cut off is dropped from it.

    Raises:
        BadData: for a line that is no run.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"{path}: expected a file of trainings, got {error}") from None
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    runs = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            runs.append(Run.of(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadData(f"{path}: expected a training as line {number}, got {error!r}") from None
    return runs


def sweep(
    specs: Iterable[Spec], path: Path | None, *, jobs: int, threads: int, device: str, where: str
) -> list[Run]:
    """Train what the file does not hold yet, appending to it; return the runs of all specs, in order."""
    specs = list(dict.fromkeys(specs))
    done = {run.spec: run for run in (finished(path) if path else [])}
    left = [spec for spec in specs if spec not in done]
    if left:
        trained = _train_all(left, jobs, threads, device, where)
        for run in (bar := tqdm(trained, total=len(left))):
            done[run.spec] = run
            if path is not None:
                with path.open("a", encoding="utf-8") as file:
                    file.write(run.line() + "\n")
            bar.set_description(f"{run.spec.norm}, batch {run.spec.batch}: {run.accuracy:.1%}")
    return [done[spec] for spec in specs]


def _train_all(specs: Sequence[Spec], jobs: int, threads: int, device: str, where: str) -> Iterator[Run]:
    if jobs == 1:
        set_threads(threads)
        yield from (train(spec, device, where) for spec in specs)
        return
    # spawned: a forked child of a process with OpenMP threads may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, set_threads, (threads,))
    try:
        for one in as_completed([pool.submit(train, spec, device, where) for spec in specs]):
            yield one.result()
    finally:  # not `with`, whose own shutdown would let all that waits run
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=1)
def dataset(name: str) -> Images:
    """Return the images of a spec, read once in a process."""
    return load(None if name == DEFAULT else name)


def train(spec: Spec, device: str, where: str) -> Run:
    """Train once."""
    data = dataset(spec.data).subset(spec.images)
    settings = Settings(batch=spec.batch, rate=spec.rate, seed=spec.seed, device=device)
    x, labels = settings.tensors(data.x, data.labels)
    test = settings.tensors(data.x_test, data.labels_test)
    batches = len(x) // spec.batch
    steps = spec.epochs * batches
    network = build(spec.network, data.x.shape[1], data.classes, spec.seed).to(device)
    network = normalized(
        network, spec.norm, batch=spec.batch, steps=steps, gradient=spec.gradient, seed=spec.seed
    )
    trainee = Trainee(network.train(), settings, steps)
    seconds, losses, found = np.empty(steps), [], []
    ends = {round(steps * k / TESTS) for k in range(1, TESTS)} - {0, steps}
    for k in range(steps):
        if k % batches == 0:
            order = np.random.default_rng([spec.seed, 1, k // batches]).permutation(len(x))
        chosen = order[k % batches * spec.batch :][: spec.batch]
        loss, seconds[k] = trainee.step(x[chosen], labels[chosen])
        losses.append(loss)
        if k + 1 in ends:
            found.append((k + 1, accuracy(network, test[0][:FEW], test[1][:FEW])))
    final = accuracy(network, *test)
    values = np.array([float(loss) for loss in losses])
    curve = [float(f"{part.mean():.4g}") for part in np.array_split(values, min(POINTS, steps))]
    return Run(
        spec,
        final,
        tuple(curve),
        (*found, (steps, final)),
        round(share(trainee, x[: spec.batch], labels[: spec.batch], PROFILED), 4),
        round(float(np.median(seconds)) * 1e3, 3),
        where,
        datetime.date.today().isoformat(),
    )
