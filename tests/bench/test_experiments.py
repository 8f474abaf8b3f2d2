"""The table of the calibration: counts against a loop, and what is left out of them."""

import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from processes import run_command

from llava_bidir.common.errors import UserError
from probes.world_options import CalibratedStudy
from probes.worlds import calibrate
from probes.worlds.calibrate import (
    COLUMNS,
    DESIGNS,
    MASKS,
    MODELS,
    NEGATIVES,
    count_verdicts,
)
from probes.worlds.random_llms import FAMILIES, OF_LANGUAGE

ROOT = Path(__file__).parents[3]


def claims(seeds: int = 10) -> list[dict]:
    rng = np.random.default_rng(0)
    found = []
    for seed in range(seeds):
        for study, claim, truth in (
            ("planted", "recovery (causal)", "planted"),
            ("random", "recovery (causal)", "absent"),
            ("merged0", "adapter_drop", "absent"),
        ):
            said = {column: bool(rng.random() < 0.5) for column in COLUMNS}
            said["paper"] = None if seed % 3 == 0 else said["paper"]
            found.append(
                {
                    "study": study,
                    "claim": claim,
                    "truth": truth,
                    "seed": seed,
                }
                | said
            )
            found[-1]["beyond_random_value"] = float(rng.normal())
    return found


def test_counts_are_those_of_a_loop_and_untested_counts_neither_way():
    entries = claims()
    rows = count_verdicts(entries)
    assert len(rows) == 3 * len(COLUMNS)
    for row in rows:
        yes = of = 0
        for entry in entries:
            if (entry["study"], entry["claim"]) == (row["study"], row["claim"]) and entry[
                row["column"]
            ] is not None:
                yes = yes + entry[row["column"]]
                of = of + 1
        assert (row["yes"], row["of"]) == (yes, of)
        assert row["low"] <= yes / of <= row["high"]
    assert {row["of"] for row in rows if row["column"] == "paper"} == {6}


@pytest.mark.parametrize(
    ("yes", "low", "high"), [(0, 0.0, 0.3085), (10, 0.6915, 1.0), (5, 0.1871, 0.8129)]
)
def test_intervals_are_those_of_clopper_and_pearson(yes, low, high):
    """Ten seeds; from the tables of the binomial distribution."""
    entries = [dict.fromkeys(COLUMNS, i < yes) | {"beyond_random_value": 0.1} for i in range(10)]
    rows = count_verdicts(
        [
            {
                "study": "planted",
                "claim": "recovery",
                "truth": "planted",
            }
            | e
            for e in entries
        ]
    )
    assert all(abs(row["low"] - low) < 1e-4 and abs(row["high"] - high) < 1e-4 for row in rows)


def test_finished_seeds_are_kept_and_counted_with_new_ones(tmp_path, monkeypatch):
    made = []

    def make(folder, *_) -> None:
        made.append(folder.name)

    monkeypatch.setattr(calibrate, "_make_models", make)
    monkeypatch.setattr(
        calibrate, "_study", lambda folder, name, seed: [claims(1)[0] | {"study": name}]
    )
    for seeds in ([0, 1], [1, 2]):
        calibrate.calibrate(tmp_path, seeds)
    with pytest.raises(UserError, match="holds a result of scale 0.1, scenes 2"):
        calibrate.calibrate(tmp_path, [0, 3], scale=0.2)
    assert made == ["seed0", "seed1", "seed2"]
    table = pd.read_csv(tmp_path / "calibration.csv").query("column == 'supported'")
    assert set(table["study"]) == set(DESIGNS)
    assert set(table["of"]) == {3}, "seed 1 counts once"
    assert json.loads((tmp_path / "seed0/claims.json").read_text())["claims"]


def test_every_studied_model_is_planted_after_its_source():
    order = list(MODELS)
    for design in DESIGNS.values():
        source = MODELS[design.model].source
        assert not source or order.index(source) < order.index(design.model)
        # each model is made from one that is made under the same mask, too
        made = {mask for d in DESIGNS.values() if d.model == source for mask in d.masks}
        assert not source or set(design.masks) <= made or design.masks == MASKS[1:]


def test_each_family_of_random_llms_is_an_entry_without_trained_probes():
    assert list(get_args(CalibratedStudy)) == list(DESIGNS)
    assert set(DESIGNS) >= {"random", "language", *FAMILIES} - {"shuffled"}
    for name in NEGATIVES:
        assert not DESIGNS[name].fit
        arms = DESIGNS[name].arms
        assert [sum(arm.startswith(kind) for arm in arms) for kind in ("random", "permuted")] == [
            2,
            2,
        ]
        keeps_training = name in ("language", *OF_LANGUAGE)
        assert MODELS[name].source == ("" if keeps_training else "planted")


@pytest.mark.nightly
def test_a_seed_ends_in_a_table_of_true_and_false_claims(tmp_path, monkeypatch):
    """The smallest world and two steps: what is planted is too weak to be found, but each claim has its truth."""
    few = {"recovery": ("--steps", "2")}
    short = {
        name: model._replace(options=few.get(model.what, model.options))
        for name, model in MODELS.items()
    }
    monkeypatch.setattr(calibrate, "MODELS", short)
    some = {name: DESIGNS[name] for name in ("planted", "random", "merged0", "merged1")}
    monkeypatch.setattr(calibrate, "DESIGNS", some)
    calibrate.calibrate(tmp_path, [3], scale=0.01)
    rows = pd.read_csv(tmp_path / "calibration.csv")
    assert set(rows["study"]) == set(some)
    assert set(rows["of"]) == {1}
    assert set(rows["column"]) == set(COLUMNS)
    truth = rows.groupby(["study", "truth"]).claim.unique().apply(sorted).to_dict()
    recovery = ["recovery (bidirectional)", "recovery (causal)"]
    assert (
        truth["planted", "planted"]
        == truth["random", "absent"]
        == recovery + ["starvation", "starvation_first_row"]
    )
    assert truth["merged0", "absent"] == truth["merged1", "planted"] == ["adapter_drop"]
    before = (tmp_path / "seed3/planted/causal/trained/metrics.json").stat().st_mtime_ns
    calibrate.calibrate(tmp_path, [3], scale=0.01)
    assert (tmp_path / "seed3/planted/causal/trained/metrics.json").stat().st_mtime_ns == before
    power = f"experiments/toy/power.py --out {tmp_path} --seeds 3 --draws 2".split()
    done = run_command([sys.executable, *power], cwd=ROOT)
    rows = done.stdout.partition("supported beside 2\n")[2].splitlines()
    assert [row.split()[:2] for row in rows[:2]] == [
        ["recovery", "(causal)"],
        ["recovery", "(bidirectional)"],
    ]
