"""The examples of the README and the docs run as they are printed, and their links lead somewhere."""

import re
from pathlib import Path

import numpy as np
import pytest

import sbncore as sbn

README = Path(__file__).parents[1] / "README.md"
DOCS = README.with_name("docs")


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_numpys_examples_run(rng):
    _, _, numpys, _ = examples(README)
    names = {}
    exec(numpys, names)
    assert names["grads"].x.shape == (32, 64, 56, 56) and (names["y"] >= 0).all()
    forward_and_backward, training_loop, gradients = examples(DOCS / "functions.md")
    exec(forward_and_backward, names)
    assert names["grads"].weight.shape == (64,)
    names["batches"] = [rng.normal(size=(2, 8, 64, 6, 6)).astype(np.float32) for _ in range(3)]
    exec(training_loop, names)
    norm = names["norm"]
    assert norm.num_batches_tracked == 3 and not norm.training and np.abs(norm.bias).max() > 0
    sbn = names["sbn"]
    names |= {
        "x": rng.normal(size=(4, 3, 5)),
        "weight": np.ones(3),
        "forward": lambda x, weight: sbn.forward(x, weight),
        "backward": lambda dy, saved: sbn.backward(dy, saved)[:2],
    }
    exec(gradients, names)


def test_jaxs_examples_run():
    jax = pytest.importorskip("jax")
    *_, jaxs = examples(README)
    names = {}
    exec(jaxs, names)
    assert isinstance(names["y"], jax.Array) and names["gradient"].shape == (8,)
    function, flax, residuals = examples(DOCS / "jax.md")
    names = {}
    exec(function, names)
    assert names["gradient"].shape == (64,) and names["mean"].any()
    exec(residuals, names)
    assert np.array_equal(names["grads"].x, sbn.backward(np.ones_like(names["y"]), names["saved"]).x)
    pytest.importorskip("flax")
    exec(flax, names)
    assert type(names["model"].bn) is type(names["layer"])


def test_pytorchs_examples_run():
    torch = pytest.importorskip("torch")
    nn = torch.nn

    def model():
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)
        )

    names = {"sbn": sbn, "torch": torch, "model": model()}
    convert, virtual, *_ = examples(README)
    exec(convert, names)
    assert names["model"][1].activation == "relu"
    names |= {"model": model(), "x": torch.randn(2, 3, 8, 8), "labels": torch.tensor([1, 7])}
    exec(virtual, names)
    assert names["loss"].isfinite() and names["model"].model[1].weight.grad is not None
    (layer,) = examples(DOCS / "torch.md")
    exec(layer, names)
    assert (names["y"] >= 0).all()
    (choosing,) = examples(DOCS / "choosing-a-sampler.md")
    exec(choosing, names)
    assert type(names["model"][1]).__name__ == "SampledBatchNorm2d"


@pytest.mark.parametrize("name", ["concepts", "mathematics", "migration", "processes"])
def test_pages_run(name):
    page = DOCS / f"{name}.md"
    if "import torch" in page.read_text(encoding="utf-8"):
        pytest.importorskip("torch")
    names = {}
    for block in examples(page):
        exec(block, names)


def test_pictures_are_what_is_drawn():
    """Every `sampler` that opens a paragraph, followed by its four maps."""
    names, text = {}, (DOCS / "concepts.md").read_text(encoding="utf-8")
    for block in examples(DOCS / "concepts.md"):
        exec(block, names)
    shown = re.findall(r"^`([A-Z].*?\))`.*?\n\n((?:    [#. ]+\n)+)", text, re.MULTILINE | re.DOTALL)
    assert len(shown) == 7
    for sampler, maps in shown:
        drawn = names["picture"](eval(f"sbn.{sampler}", names))
        assert [line.strip() for line in maps.splitlines()] == drawn.splitlines(), sampler


def test_every_command_is_a_target_of_the_makefile():
    makefile = README.with_name("Makefile")
    if not makefile.exists():
        pytest.skip("no Makefile beside the tests")
    targets = re.findall(r"^([a-z-]+):", makefile.read_text(encoding="utf-8"), re.MULTILINE)
    for command in re.findall(r"make ([a-z-]+)", README.read_text(encoding="utf-8")):
        assert command in targets


def test_the_site_has_every_page():
    site = README.with_name("mkdocs.yml")
    if not site.exists():
        pytest.skip("no mkdocs.yml beside the tests")
    listed = re.findall(r": (\S+\.md)$", site.read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} <= set(listed)
    assert all((README.parent / page).exists() for page in listed)


@pytest.mark.parametrize(
    "page", [README, README.with_name("CONTRIBUTING.md"), *DOCS.glob("*.md")], ids=lambda p: p.name
)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link
