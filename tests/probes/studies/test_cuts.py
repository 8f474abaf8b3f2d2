"""A study whose encoder is cut: its arms, its claim against differences of recoveries, and what it leaves alone."""

import json
from contextlib import redirect_stdout
from io import StringIO

import pytest
import tiny_encoders
import tiny_models
from studies import study_of

from llava_bidir.common.errors import UserError
from probes.runs.read import ProbeRun
from probes.studies import estimate
from probes.studies.plan import plan
from probes.studies.run import run_study

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


def test_arms_are_those_that_the_claim_needs(
    checkpoints, segmentation, tmp_path, monkeypatch, capsys
):
    """Under each cut; of an encoder with CLS also without it. Other studies have none of them."""
    settings = {"cuts": ("encoder", "llm", "both"), "only": ("solve",), "draws": 2}
    options = study_of({"": checkpoints["causal"]}, segmentation, tmp_path, **settings)
    names = [step.name for step in plan(options).steps]
    as_it_is = ["trained", "random0", "random1", "permuted0", "permuted1", "adapter0", "adapter1"]
    cuts = ("encoder", "encoder_alone", "llm", "both", "both_alone")
    expected = [f"cut_{cut}_{arm}" for cut in cuts for arm in ARMS]
    assert names == [*as_it_is, *expected]
    plain = plan(study_of({"": checkpoints["causal"]}, segmentation, tmp_path, draws=2))
    assert not [step.name for step in plain.steps if "cut" in step.name]
    monkeypatch.setattr(estimate, "describe_time", lambda *_: "")  # which loads the model
    estimate.print_estimate(options)
    assert "1 cut_both_alone_trained, 2 cut_both_alone_random, 2" in capsys.readouterr().out


def test_a_cut_that_a_model_cannot_have_is_refused_before_any_work(tmp_path, segmentation):
    models = {"": tiny_encoders.STOCK["dinov2"].write(tmp_path / "dinov2")}
    for cut, message in (("llm", "it has no LLM"), ("both", "it has no LLM")):
        with pytest.raises(UserError, match=message):
            plan(study_of(models, segmentation, tmp_path / "out", cuts=(cut,)))
    names = [
        step.name
        for step in plan(study_of(models, segmentation, tmp_path / "out", cuts=("encoder",))).steps
    ]
    assert "cut_encoder_alone_permuted1" in names
    with pytest.raises(UserError, match="model.cut is given"):
        plan(study_of(models, segmentation, tmp_path / "out", ["--model.cut", "encoder"]))


@pytest.mark.nightly
def test_the_claims_are_differences_of_recoveries(study):
    """Of the trained model, and beyond the same difference of each draw of a control."""
    results = json.loads((study / "report/results.json").read_text())
    claims = {claim["claim"]: claim for claim in results["claims"]}
    assert claims.keys() == {"adapter_drop", "recovery", CLAIM, f"{CLAIM}_alone"}
    for prefix, name in zip(CUTS, (CLAIM, f"{CLAIM}_alone"), strict=True):
        expected = {}
        for arm in ARMS:
            runs = [ProbeRun(study / folder) for folder in (f"{prefix}{arm}", arm)]
            cut, intact = (run.effects["recovery"] for run in runs)
            expected[arm] = (cut - intact).value
            assert [run.cut for run in runs] == [prefix[4:-1], None]
        verdicts = claims[name]["verdicts"]
        assert claims[name]["value"] == pytest.approx(expected["trained"])
        for control, column in verdicts["beyond_random"]["controls"].items():
            draws = [expected[f"{control}{i}"] for i in range(2)]
            assert column["value"] == pytest.approx(expected["trained"] - sum(draws) / 2)


@pytest.mark.nightly
def test_results_say_what_the_context_adds_at_each_site(study):
    results = json.loads((study / "report/results.json").read_text())
    assert results["cuts"].keys() == {"encoder", "encoder_alone"}
    for prefix in CUTS:
        by_mask = results["cuts"][prefix[4:-1]]
        runs = [ProbeRun(study / folder) for folder in ("trained", f"{prefix}trained")]
        for row in by_mask["causal"]:
            intact, cut = (run.site_scores[row["site"]].value for run in runs)
            assert row["added"] == pytest.approx(intact - cut) and row["score"] == cut


@pytest.mark.nightly
def test_a_run_is_read_under_its_cut(study):
    """Its model gives the states that its probes were solved on, also to other images."""
    mllm, probes_of_run = ProbeRun(study / "cut_encoder_alone_random0").loaded
    assert mllm.cut == "encoder_alone"
    pixels = tiny_models.pixels(1)
    changed = pixels.clone()
    changed[..., :4, :4] += 1  # of the first patch
    before, after = (mllm.states(x, ["encoder"])["encoder"][0] for x in (pixels, changed))
    assert [*(before != after).any(-1)] == [True, *[False] * (len(before) - 1)]
    assert "adapter" in probes_of_run
