"""Encoders with planted differences, from photos to the page: a rotation of states, and two merged classes."""

import json
from pathlib import Path

import planted_pairs
import pytest
import torch

from probes.cli import main
from probes.report.model_comparison import compare_classes, differs

FILE = Path(planted_pairs.__file__)
OPTIONS = (
    "--arms trained --only solve report --trainer.accelerator cpu --data.batch_size 20".split()
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study of three encoders."""
    folder = tmp_path_factory.mktemp("planted")
    data = planted_pairs.write_photos(folder / "photos")
    models = [f"{name}={FILE}:{name}" for name in ("plain", "rotated", "merged")]
    main(["study", *models, str(data), "--out", str(folder / "study"), *OPTIONS])
    return folder / "study"


@pytest.fixture(scope="module")
def results(study):
    return json.loads((study / "report/results.json").read_text())


def comparisons(results: dict, second: str, of: str) -> dict[str, dict]:
    """Return the differences of a model from `plain` by site or class."""
    found = [x for x in results["comparisons"] if (x["b"], x["of"]) == (second, of)]
    assert {x["a"] for x in found} == {"plain"}
    return {x.get("class", x["site_a"]): x for x in found}


def named(results: dict, second: str) -> set[str]:
    """Return the classes in which a model is said to differ from `plain`."""
    (entry,) = (x for x in results["compared"] if x["second"] == second)
    return {x["class"] for x in entry["classes"] if differs(x)}


def test_states_are_rotated():
    encoders = [planted_pairs.Encoder(rotates=rotates) for rotates in (False, True)]
    pixels = torch.randn(2, 3, 64, 64)
    plain, rotated = (encoder(pixels) for encoder in encoders)
    rotation = encoders[1].layers[0].rotation
    assert (rotation - torch.eye(len(rotation))).abs().max() > 0.5
    torch.testing.assert_close(plain @ rotation.T, rotated, rtol=1e-4, atol=1e-5)


def test_no_difference_is_shown_between_states_and_their_rotation(study, results):
    for of in ("site", "best layer", "class"):
        for x in comparisons(results, "rotated", of).values():
            low, high = x["ci95"]
            assert abs(x["value"]) < 1
            assert low <= 0 <= high or of == "site", "each site is by itself, others hold together"
    assert named(results, "rotated") == set()
    page = (study / "report/index.html").read_text()
    assert "No difference between rotated and plain is shown" in page
    assert "none of 4 classes is shown to differ" in page


def test_merged_classes_are_named_with_their_differences(study, results):
    (best,) = comparisons(results, "merged", "best layer").values()
    assert best["ci95"][1] < -1
    classes = comparisons(results, "merged", "class")
    assert list(classes) == planted_pairs.CLASSES
    assert named(results, "merged") == set(planted_pairs.MERGED)
    for name in planted_pairs.MERGED:
        assert classes[name]["ci95"][1] < -1
    page = (study / "report/index.html").read_text()
    (sentence,) = (line for line in page.split("<br>") if line.startswith("IoU there differs in 2"))
    assert all(f"{name} −" in sentence for name in planted_pairs.MERGED)
    assert "merged and plain, class by class" in page


def test_all_compared_probes_have_certificates(results):
    for entry in results["compared"]:
        assert entry["unconverged"] == {"first": [], "second": []}


def test_a_class_that_is_nowhere_moves_no_name():
    """Class 1 is neither labelled nor predicted; class 2 is read 20 points worse."""
    generator = torch.Generator().manual_seed(0)
    first = 0.6 + 0.01 * torch.randn(200, 3, generator=generator).double()
    second = first + 0.005 * torch.randn(200, 3, generator=generator)
    second[:, 2] -= 0.2
    first[:, 1] = second[:, 1] = torch.nan
    entries = compare_classes(["sky", "wall", "road"], first, second)
    assert [x["class"] for x in entries] == ["sky", "road"]
    assert [x["class"] for x in entries if differs(x)] == ["road"]


def test_intervals_of_classes_cover_all_of_them_together():
    """Of equal models with 20 classes, one in 20 studies has a class outside of its interval."""
    generator = torch.Generator().manual_seed(0)
    outside = 0
    alone = 0
    names = [str(k) for k in range(20)]
    for _ in range(200):
        observed = 0.02 * torch.randn(20, generator=generator).double()
        drawn = observed + 0.02 * torch.randn(400, 20, generator=generator)
        second = torch.cat([observed[None], drawn])
        entries = compare_classes(names, torch.zeros_like(second), second)
        outside += any(not low <= 0 <= high for low, high in (x["ci95"] for x in entries))
        alone += bool((observed.abs() > 1.96 * 0.02).any())
    assert outside <= 20
    assert alone > 100, "else this test would not tell intervals of single classes"
