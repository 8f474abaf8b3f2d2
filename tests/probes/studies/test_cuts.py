"""A study whose encoder is cut: its arms, its claim against differences of recoveries, and what it leaves alone."""

import json
from contextlib import redirect_stdout
from io import StringIO

import pytest
import tiny_models
import torch
from studies import study_of

from llava_bidir.common.errors import UserError
from probes.runs.read import ProbeRun
from probes.studies.plan import plan
from probes.studies.run import run, run_study

OPTIONS = "--data.batch_size 8 --trainer.accelerator cpu --folds 2 --strengths 1e-1".split()
ARMS = ("trained", "random0", "random1", "permuted0", "permuted1")
CUTS = ("cut_encoder_", "cut_encoder_alone_")
CLAIM = "recovery_without_context"


@pytest.fixture(scope="module")
def study(checkpoints, segmentation, tmp_path_factory):
    """Return the folder of a finished study."""
    out = tmp_path_factory.mktemp("studies") / "study"
    settings = {"arms": ARMS, "only": ("solve", "report"), "cuts": ("encoder",)}
    with redirect_stdout(StringIO()):
        run_study(study_of({"": checkpoints["causal"]}, segmentation, out, OPTIONS, **settings))
    return out


def test_the_claim_is_the_difference_of_recoveries(study):
    """Of the trained model, and beyond the same difference of each draw of a control."""
    results = json.loads((study / "report/results.json").read_text())
    by_model = {entry["model"]: entry["claims"] for entry in results["studies"]}
    names = [{claim["claim"]: claim for claim in claims} for claims in by_model.values()]
    assert [CLAIM in claims for claims in names] == [False, True, True]
    for prefix, claims in zip(CUTS, names[1:], strict=True):
        gains = {
            arm: [ProbeRun(study / f"{folder}{arm}").effects["recovery"] for folder in (prefix, "")]
            for arm in ARMS
        }
        expected = {arm: (cut - intact).value for arm, (cut, intact) in gains.items()}
        verdicts = claims[CLAIM]["verdicts"]
        assert claims[CLAIM]["value"] == pytest.approx(expected["trained"])
        for control, column in verdicts["beyond_random"]["controls"].items():
            draws = [expected[f"{control}{i}"] for i in range(2)]
            assert column["value"] == pytest.approx(expected["trained"] - sum(draws) / 2)
        assert "recovery" in claims and "adapter_drop" not in claims
