"""Experiments in small; test_bench.py checks what all of them import, and tests/real runs the real model's."""

import os
import sys
from pathlib import Path

import pandas as pd
import pytest
from processes import run_command

from experiments.toy import calibrate
from experiments.toy.calibrate import COLUMNS, DESIGNS, MODELS

ROOT = Path(__file__).parents[2]
TINY = {  # words of each script; {demo} is the folder of a demo, {out} a new one
    "statistics.draws": "--studies 20",
    "statistics.intervals": "--studies 4",
    "statistics.best_layer": "--studies 2 --images 20",
    "statistics.contrasts": "--studies 4",
    "statistics.reproduces": "{demo}/causal/planted/hf {demo}/assets/segmentation --sites layer_01 --out {out}",
    "toy.cues": "{demo}/causal/trained",
    "toy.encoder_free": "{demo}/assets {out} --steps 2",
    "toy.planted_sink": "{demo} {out} --steps 2 --arms trained",
    "beyond_random.beyond_random": "{demo}/bidirectional/planted/hf {demo}/assets/segmentation "
    "--subjects 1 --families shuffled --training 30 --validation 10",
}


@pytest.mark.nightly
@pytest.mark.parametrize("script", TINY)
def test_an_experiment_runs_to_its_end(script, tmp_path):
    words = TINY[script].format(demo=os.environ.get("DEMO", "runs/demo"), out=tmp_path)
    command = [sys.executable, "-m", f"experiments.{script}", *words.split()]
    assert run_command(command, cwd=ROOT).stdout


@pytest.mark.nightly
def test_a_seed_ends_in_a_table_of_true_and_false_claims(tmp_path, monkeypatch):
    """The smallest world and two steps: what is planted is too weak to be found, but each claim has its truth."""
    recovery = ("--steps", "2")
    for name, model in MODELS.items():
        if model.what == "recovery":
            monkeypatch.setitem(MODELS, name, model._replace(options=recovery))
    some = ("planted", "random", "orthogonal", "merged0", "merged1")
    monkeypatch.setattr(calibrate, "DESIGNS", {name: DESIGNS[name] for name in some})
    calibrate.calibrate(tmp_path, [3], scale=0.01)
    rows = pd.read_csv(tmp_path / "calibration.csv")
    assert set(rows["study"]) == set(some)
    assert set(rows["column"]) == set(COLUMNS)
    truth = rows.groupby(["study", "truth"]).claim.unique().apply(sorted).to_dict()
    recovery = ["recovery (bidirectional)", "recovery (causal)"]
    claims = [*recovery, "starvation", "starvation_first_row"]
    assert truth["planted", "planted"] == truth["random", "absent"] == claims
    assert truth["merged0", "absent"] == truth["merged1", "planted"] == ["adapter_drop"]
    assert truth["orthogonal", "absent"] == recovery[:1]
    before = (tmp_path / "seed3/planted/causal/trained/metrics.json").stat().st_mtime_ns
    calibrate.calibrate(tmp_path, [3], scale=0.01)
    assert (tmp_path / "seed3/planted/causal/trained/metrics.json").stat().st_mtime_ns == before
    words = f"-m experiments.toy.power --out {tmp_path} --seeds 3 --draws 2".split()
    done = run_command([sys.executable, *words], cwd=ROOT)
    table = done.stdout.partition("supported beside 2\n")[2].splitlines()
    assert [" ".join(row.split()[:2]) for row in table[:2]] == recovery[::-1]
