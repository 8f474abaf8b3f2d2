"""Steps that a study leaves out, that fail, or that have nothing to measure; settings from words and from files."""

import shutil
import threading
from pathlib import Path

import pytest
from dataset_layouts import write_voc2012
from extensions import EXAMPLES, forgotten
from studies import study_of

from llava_bidir.common.errors import NothingToMeasure, UserError
from llava_bidir.common.files import exclusive_run_lock
from llava_bidir.common.imports import take_imports
from probes.config import StudyOptions
from probes.steps.record import OUTSTANDING, must_replace, unfinished_steps
from probes.studies import run
from probes.studies.plan import plan

SITES = "[encoder, adapter, layer_02]"


def reasons(study: StudyOptions) -> dict[str, str]:
    """Return what became of unfinished steps, and why."""
    steps = unfinished_steps(study.out)
    return {entry["step"]: f"{entry['outcome']}: {entry['reason']}" for entry in steps}


def test_arms_that_change_no_probed_site_are_left_out_with_their_analyses(settings):
    steps = plan(settings(options=("--model.sites", "[encoder]"))).steps
    planned = {step.name for step in steps if not step.why_left_out}
    analyses = {"trained/position", "trained/norms", "trained/sinks"}
    assert planned == {"trained", "adapter0", "report"} | analyses


def test_sites_in_words_and_in_a_file_are_those_of_every_arm_that_has_them(settings, tmp_path):
    file = tmp_path / "sites.yaml"
    file.write_text(f"model: {{sites: {SITES}}}\n")
    for words in (("--model.sites", SITES), ("-c", str(file)), (f"--config={file}",)):
        steps = plan(settings(options=words, only=("solve",))).steps
        sites = {step.name: step.config.model.sites for step in steps}
        assert sites == {
            "trained": ["encoder", "adapter", "layer_02"],
            "random0": ["adapter", "layer_02"],
            "permuted0": ["adapter", "layer_02"],
            "adapter0": ["encoder", "adapter"],
        }


def test_a_config_of_other_content_is_other_options(settings, ran, tmp_path):
    file = tmp_path / "solve.yaml"

    def made(resize: str) -> StudyOptions:
        file.write_text(f"model: {{image_resize: {resize}}}\n")
        return settings(options=("-c", str(file)), only=("solve",))

    first = ran.of(made("squash"))
    assert ran.of(made("squash")) == []
    assert ran.of(made("pad")) == first == ["trained", "random0", "permuted0", "adapter0"]
    same = "--data.num_workers 1 --data.cache_features --data.name other --memory-gb 1"
    same = [*same.split(), "--trainer.devices", "1", "--model.image_resize", "pad"]
    assert ran.of(settings(options=same, only=("solve",))) == [], "no number changes"
    other = made("center_crop")
    assert not must_replace(plan(other).steps[0], other.out), "replaced if asked to only"


def test_an_analysis_of_a_file_is_a_step_that_is_done_again_when_the_file_has_changed(
    settings, ran, tmp_path
):
    file = Path(shutil.copy(EXAMPLES / "analysis.py", tmp_path / "mine.py"))
    with forgotten():
        take_imports(["--import", str(file)])
        study = settings(add=("gains",))
        steps = [f"{arm}/gains" for arm in ("trained", "random0", "permuted0")]
        assert {*steps} <= {*ran.of(study)}
        assert ran.of(study) == []
        file.write_text(file.read_text() + "# another line\n")
        assert {*ran.of(study)} == {*steps, "report"}
    with pytest.raises(UserError, match="no analysis 'gains'; .*--import FILE.py registers"):
        plan(study)


def test_the_report_reads_truth_and_effects_of_other_analyses(settings, segmentation, monkeypatch):
    made = settings()
    report = plan(made).steps[-1]
    finished = made.out / "trained"
    monkeypatch.setattr("probes.studies.plan.finished_runs", lambda out: [finished])
    monkeypatch.setattr("probes.studies.plan.unfinished_steps", lambda out: [])
    finished.mkdir(parents=True)
    assert report.inputs() == {"truth.json": None}
    (finished / "mine_effects.safetensors").write_text("")
    truth = segmentation / "truth.json"
    truth.write_text("{}")
    try:
        assert report.inputs().keys() == {"trained/mine_effects.safetensors", "truth.json"}
    finally:
        truth.unlink()


def test_options_of_the_data_reach_the_check_of_classes(tmp_path, checkpoints):
    root = write_voc2012(tmp_path / "voc")
    options = ["--data.root", str(root), "--data.options.background", "class"]

    def planned(words):
        models = {"": checkpoints["causal"]}
        add = ("knockout.classes=background",)
        return plan(study_of(models, "voc2012", tmp_path / "out", words, add=add))

    assert planned(options)
    with pytest.raises(UserError, match="no class 'background'"):
        planned(options[:2])


def test_a_failed_analysis_costs_no_other_and_is_tried_again(settings, ran):
    made = settings(add=("maps",))
    ran.failing = {
        "trained/knockout": UserError("trained/knockout: broken"),
        "trained/maps": RuntimeError("a bug"),
    }
    with pytest.raises(UserError, match="2 of the steps failed.*broken.*RuntimeError: a bug"):
        ran.of(made)
    names = ("position", "norms", "sinks", "knockout", "maps")
    trained = ["trained", *(f"trained/{name}" for name in names)]
    assert ran == [*trained, "report", "random0", "permuted0", "adapter0", "report"]
    assert reasons(made)["trained/knockout"] == "failed: broken"
    assert "a bug" in reasons(made)["trained/maps"]
    assert "a bug" in (made.out / "study.log").read_text()
    ran.failing = {}
    knockouts = {f"{arm}/knockout" for arm in ("trained", "random0", "permuted0")}
    assert {*ran.of(made)} == knockouts | {"trained/maps", "report"}
    assert not unfinished_steps(made.out)
    assert ran.of(made) == []


def test_the_first_report_says_which_controls_are_outstanding(settings, ran):
    """It comes after the trained arms of all models; here the first control ends the study."""
    made = settings({"a": "causal", "b": "bidirectional"})
    ran.failing = {"a/random0": UserError("a/random0: no memory")}
    with pytest.raises(UserError, match="no memory"):
        ran.of(made)
    assert ran[-2:] == ["report", "a/random0"]
    assert {name.split("/")[1] for name in ran[:-2]} == {"trained"}
    for name in ("a/random0", "b/permuted0"):
        assert reasons(made)[name].endswith(OUTSTANDING)
    ran.failing = {}
    names = ran.of(made)
    assert {"a/random0", "b/permuted0"} < {*names} and names[-1] == "report"
    assert not unfinished_steps(made.out)


def test_a_label_does_not_make_an_arm_trained(settings):
    steps = plan(settings({"re_trained": "causal"})).steps[:-1]
    trained = {step.name for step in steps if step.is_trained}
    analyses = ("", "/position", "/norms", "/sinks", "/knockout")
    assert trained == {f"re_trained/trained{name}" for name in analyses}


def test_what_was_left_out_is_not_tried_again(settings, ran, capsys):
    made = settings()
    ran.failing = {"trained/knockout": NothingToMeasure("no image has a wrong patch")}
    assert ran.of(made)[4:6] == ["trained/knockout", "report"]
    assert ran.of(made) == [] and "nothing to do" in capsys.readouterr().out
    more = settings(draws=2)
    names = ran.of(more)
    assert "random1" in names
    assert not any(name.endswith("knockout") for name in names), "the new draw has no partner"
    (made.out / "trained/metrics.json").write_text('{"classes": [1]}')
    ran.failing = {}
    knockouts = {f"{arm}/knockout" for arm in ("trained", "random0", "random1")}
    assert knockouts <= {*ran.of(more)}, "other probes can have mistakes"


def test_a_report_waits_for_that_of_another_job(settings, monkeypatch):
    """Jobs of a cluster, each of some arms, can end together; the second one failed."""
    made = settings()
    wrote = threading.Event()
    monkeypatch.setattr("probes.studies.table.write_report", lambda options: wrote.set())
    job = threading.Thread(target=run._run_step, args=(made, plan(made).steps[-1]))
    with exclusive_run_lock(made.out, "report-step"):
        job.start()
        assert not wrote.wait(0.5)
    job.join(60)
    assert wrote.is_set()


def test_a_step_that_the_plan_left_out_is_recorded_and_returns_with_its_sites(settings, ran):
    some = settings(options=("--model.sites", SITES))
    solved = ["random0", "permuted0", "adapter0"]
    trained = ["trained", "trained/position", "trained/norms", "trained/sinks"]
    assert ran.of(some) == [*trained, "report", *solved, "report"]
    knockouts = {f"{arm}/knockout" for arm in ("trained", "random0", "permuted0")}
    assert {name for name in reasons(some) if "knockout" in name} == knockouts
    assert "layer_01" in reasons(some)["trained/knockout"]
    assert ran.of(some) == []
    assert knockouts | {"report"} <= {*ran.of(settings())}
    assert not unfinished_steps(some.out)
