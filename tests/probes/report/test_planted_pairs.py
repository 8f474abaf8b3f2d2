"""Encoders with planted differences, from photos to the page: a rotation of states, and two merged classes."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import planted_pairs
import probe_runs
import pytest
import torch
from report_parts import differs

from llava_bidir.common.bootstrap import bootstrap_weights, random_swaps
from probes.cli import main
from probes.report.compare import compare_classes

FILE = Path(planted_pairs.__file__)
MARGIN = 0.01
OPTIONS = (
    "--arms trained --only solve report --trainer.accelerator cpu --data.batch_size 20 --folds 2 "
    "--strengths 1e-5 --model.sites [layer_01,layer_02]"  # so weak that a rotation changes nothing
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> pd.DataFrame:
    """Return the differences that a study of three encoders has found."""
    folder = tmp_path_factory.mktemp("planted")
    data = planted_pairs.write_photos(folder / "photos")
    models = [f"{name}={FILE}:{name}" for name in ("plain", "rotated", "merged")]
    main(["study", *models, str(data), "--out", str(folder / "study"), *OPTIONS.split()])
    table = pd.read_csv(folder / "study/report/differences.csv")
    assert {*table["first"][table["of"] == "site"]} == {"A"}, (
        "the others are compared with the first"
    )
    table = table[table["first"] == "A"]
    return table.replace({"second": {"B": "rotated", "C": "merged"}})


def named(rows: pd.DataFrame, second: str) -> set[str]:
    """Return the classes in which a model is said to differ from `plain`."""
    classes = rows[(rows["second"] == second) & (rows["of"] == "class")]
    return {row["name"] for row in classes.to_dict("records") if differs(row)}


def test_no_difference_is_shown_between_states_and_their_rotation(rows):
    """Sites are each by itself; best layers and classes are tested together."""
    of_rotated = rows[rows["second"] == "rotated"]
    assert {*of_rotated["of"]} >= {"site", "best layer", "class"}
    assert of_rotated["difference"].abs().max() < MARGIN
    best = of_rotated[of_rotated["of"] == "best layer"]
    assert (best["low"] <= 0).all() and (best["high"] >= 0).all()
    assert named(rows, "rotated") == set()


def test_merged_classes_are_named_with_their_differences(rows):
    of_merged = rows[rows["second"] == "merged"].set_index(["of", "name"])
    assert of_merged.loc[("best layer", "best layer"), "high"] < -MARGIN
    assert [*of_merged.loc["class"].index] == planted_pairs.CLASSES
    assert named(rows, "merged") == set(planted_pairs.MERGED)
    for name in planted_pairs.MERGED:
        assert of_merged.loc[("class", name), "high"] < -MARGIN


def run_of(right: torch.Tensor, labelled: torch.Tensor) -> SimpleNamespace:
    """Return a run of one layer, whose pixels i64[N, K] that are not right are predicted as the next class."""
    predicted = right + (labelled - right).roll(1, 1)
    sums = torch.cat([right, predicted, labelled], 1)[None].double()
    return SimpleNamespace(
        sums_at=lambda sites: sums,
        sites=["layer_01"],
        task=probe_runs.CLASSES_TASK,
        groups=None,
        units_by_class=(labelled > 0).sum(0).tolist(),
        weights=bootstrap_weights(len(right), 300),
        metrics={"classes": [f"class {k}" for k in range(right.shape[1])]},
    )


def classes_of(first: SimpleNamespace, second: SimpleNamespace) -> list[dict]:
    swaps = random_swaps(len(first.weights[0])).double()
    return [*compare_classes(first, second=second, sites=("layer_01", "layer_01"), swaps=swaps)]


def test_a_class_that_is_nowhere_moves_no_name():
    """Class 1 is neither labelled nor predicted; class 3 of one model is predicted as class 0."""
    generator = torch.Generator().manual_seed(0)
    labelled = torch.randint(50, 200, (40, 4), generator=generator)
    labelled[:, 1] = 0
    right = (0.7 * labelled).long()
    right[:, 0] = labelled[:, 0]
    second = right.clone()
    second[:, 3] //= 2
    named_classes = classes_of(run_of(right, labelled), run_of(second, labelled))
    assert [x["name"] for x in named_classes] == ["class 0", "class 2", "class 3"]
    assert [x["name"] for x in named_classes if differs(x)] == ["class 0", "class 3"]


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
        named_classes = classes_of(*runs)
        named += any(differs(x) for x in named_classes)
        by_themselves += any(differs(x | {"of": "site"}) for x in named_classes)
    assert named <= 10
    assert by_themselves > 40, "else this test would not tell single classes from all"
