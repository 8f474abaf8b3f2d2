"""Encoders with planted differences, from photos to the page: a rotation of states, and two merged classes."""

import json
from pathlib import Path
from types import SimpleNamespace

import planted_pairs
import probe_runs
import pytest
import torch

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.cli import main
from probes.report.model_comparison import class_differs, compare_classes, differs

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
    return {x["class"] for x in entry["classes"] if class_differs(x)}


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
            assert low <= 0 <= high or of != "best layer", "others are each by itself"
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
    (sentence,) = (
        line
        for line in page.split("<br>")
        if line.startswith("IoU at the best layers differs in 2")
    )
    assert all(f"{name} −" in sentence for name in planted_pairs.MERGED)
    assert "merged and plain, class by class" in page


def test_all_compared_probes_have_certificates(results):
    for entry in results["compared"]:
        assert entry["unconverged"] == {"first": [], "second": []}


def run_of(right: torch.Tensor, labelled: torch.Tensor) -> SimpleNamespace:
    """Return a run of one layer, whose pixels i64[N, K] that are not right are predicted as the next class."""
    predicted = right + (labelled - right).roll(1, 1)
    sums = torch.cat([right, predicted, labelled], 1)[None].double()
    return SimpleNamespace(
        sums_at=lambda sites: sums,
        peak_layer="layer_01",
        task=probe_runs.CLASSES_TASK,
        groups=None,
        weights=bootstrap_weights(len(right), 300),
        metrics={"classes": [f"class {k}" for k in range(right.shape[1])]},
    )


def test_a_class_that_is_nowhere_moves_no_name():
    """Class 1 is neither labelled nor predicted; class 3 of one model is predicted as class 0."""
    generator = torch.Generator().manual_seed(0)
    labelled = torch.randint(50, 200, (40, 4), generator=generator)
    labelled[:, 1] = 0
    right = (0.7 * labelled).long()
    right[:, 0] = labelled[:, 0]
    second = right.clone()
    second[:, 3] //= 2
    entries = compare_classes(run_of(right, labelled), run_of(second, labelled))
    assert [x["class"] for x in entries] == ["class 0", "class 2", "class 3"]
    assert [x["class"] for x in entries if class_differs(x)] == ["class 0", "class 3"]


def test_equal_models_seldom_have_a_class_that_is_named():
    """Each of 20 classes is in one photo in seven."""
    generator = torch.Generator().manual_seed(0)
    named = 0
    by_themselves = 0
    for _ in range(100):
        present = torch.rand(40, 20, generator=generator) < 1 / 7
        labelled = torch.randint(50, 200, (40, 20), generator=generator) * present
        runs = []
        for _ in range(2):
            rate = 0.6 + 0.1 * torch.randn(40, 20, generator=generator)
            runs.append(run_of((rate.clamp(0, 1) * labelled).long(), labelled))
        entries = compare_classes(*runs)
        named += any(map(class_differs, entries))
        by_themselves += any(map(differs, entries))
    assert named <= 10
    assert by_themselves > 40, "else this test would not tell single classes from all"
