"""Steps that a study leaves out, that fail, or that have nothing to measure; settings from words and from files."""

import threading

import pytest
from studies import study_of

from llava_bidir.common.errors import NothingToMeasure, UserError
from llava_bidir.common.files import exclusive_run_lock
from probes.steps import must_replace, unfinished_steps
from probes.studies import run
from probes.studies.config import StudyConfig
from probes.studies.plan import plan


def test_the_plan_leaves_out_what_has_no_probes_it_needs(settings):
    steps = plan(
        settings({"": "causal"}, options=("--model.sites", "[encoder, adapter, layer_02]"))
    ).steps
    lacks = {step.name: step.why_left_out for step in steps if step.why_left_out}
    assert lacks.keys() == {f"{arm}/knockout" for arm in ("trained", "random0", "permuted0")}
    assert "layer_01" in lacks["trained/knockout"]
    assert not any(step.why_left_out for step in plan(settings({"": "causal"})).steps)


def test_arms_that_change_no_probed_site_are_left_out_with_their_analyses(settings):
    steps = plan(settings({"": "causal"}, options=("--model.sites", "[encoder]"))).steps
    assert {step.name for step in steps if not step.why_left_out} == {
        "trained",
        "trained/sinks",
        "adapter0",
        "report",
    }


def test_sites_in_words_and_in_a_file_are_those_of_every_arm_that_has_them(settings, tmp_path):
    file = tmp_path / "sites.yaml"
    chosen = "[encoder, adapter, layer_02]"
    file.write_text(f"model: {{sites: {chosen}}}\n")
    for words in (
        ("--model.sites", chosen),
        ("-c", str(file)),
        (f"--config={file}",),
    ):
        steps = plan(settings({"": "causal"}, options=words, only=("solve",))).steps
        sites = {step.name: step.config.model.sites for step in steps}
        assert sites == {
            "trained": ["encoder", "adapter", "layer_02"],
            "random0": ["adapter", "layer_02"],
            "permuted0": ["adapter", "layer_02"],
            "adapter0": ["encoder", "adapter"],
        }


def test_a_config_of_other_content_is_other_options(settings, ran, tmp_path):
    file = tmp_path / "solve.yaml"
    file.write_text("model: {image_resize: squash}\n")

    def made() -> StudyConfig:
        return settings({"": "causal"}, options=("-c", str(file)), only=("solve",))

    run.run_study(made())
    ran.clear()
    run.run_study(made())
    assert not ran
    file.write_text("model: {image_resize: pad}\n")
    run.run_study(made())
    assert ran == ["trained", "random0", "permuted0", "adapter0"]
    file.write_text("model: {image_resize: center_crop}\n")
    step = plan(made()).steps[0]
    assert not must_replace(step, made().out), "replaced if asked to only"


def test_the_report_reads_truth_and_effects_of_other_analyses(settings, segmentation, monkeypatch):
    made = settings({"": "causal"})
    (report,) = (step for step in plan(made).steps if step.kind == "report")
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
    from dataset_layouts import write_voc2012

    root = write_voc2012(tmp_path / "voc")
    options = ("--data.root", str(root), "--data.options.background", "class")
    models = {"": str(checkpoints["causal"])}
    asked = {"out": tmp_path / "out", "add": ("knockout.classes=background",)}
    plan(
        study_of(
            models,
            "voc2012",
            **asked,
            options=options,
        )
    )
    with pytest.raises(UserError, match="no class 'background'"):
        plan(
            study_of(
                models,
                "voc2012",
                **asked,
                options=options[:2],
            )
        )


def test_a_failed_analysis_costs_no_other_and_is_tried_again(settings, ran):
    made = settings({"": "causal"}, add=("maps",))
    ran.failing = {
        "trained/knockout": UserError("trained/knockout: broken"),
        "trained/maps": RuntimeError("a bug"),
    }
    with pytest.raises(UserError, match="2 of the steps failed.*broken.*RuntimeError: a bug"):
        run.run_study(made)
    trained = ["trained", "trained/sinks", "trained/knockout", "trained/maps"]
    assert ran == [*trained, "report", "random0", "permuted0", "adapter0", "report"]
    reasons = {
        entry["step"]: (entry["outcome"], entry["reason"]) for entry in unfinished_steps(made.out)
    }
    assert (
        reasons["trained/knockout"] == ("failed", "broken")
        and "a bug" in reasons["trained/maps"][1]
    )
    assert "a bug" in (made.out / "study.log").read_text()
    ran.clear()
    ran.failing = {}
    run.run_study(made)
    knockouts = {f"{arm}/knockout" for arm in ("trained", "random0", "permuted0")}
    assert knockouts | {"trained/maps", "report"} == set(ran)
    assert not unfinished_steps(made.out)
    ran.clear()
    run.run_study(made)
    assert not ran


def test_the_first_report_says_which_controls_are_outstanding(settings, ran):
    """It comes after the trained arms of all models; here the first control ends the study."""
    made = settings({"a": "causal", "b": "bidirectional"})
    ran.failing = {"a/random0": UserError("a/random0: no memory")}
    with pytest.raises(UserError, match="no memory"):
        run.run_study(made)
    assert ran[-2:] == ["report", "a/random0"]
    assert {name.split("/")[1] for name in ran[:-2]} == {"trained"}
    reasons = {entry["step"]: entry["reason"] for entry in unfinished_steps(made.out)}
    assert reasons["a/random0"] == reasons["b/permuted0"] == run.OUTSTANDING
    ran.clear()
    ran.failing = {}
    run.run_study(made)
    assert {"a/random0", "b/permuted0"} < set(ran) and ran[-1] == "report"
    assert not unfinished_steps(made.out)


def test_what_was_left_out_is_not_tried_again(settings, ran, capsys):
    made = settings({"": "causal"})
    ran.failing = {"trained/knockout": NothingToMeasure("no image has a wrong patch")}
    run.run_study(made)
    assert ran[2:4] == ["trained/knockout", "report"]
    ran.clear()
    run.run_study(made)
    assert not ran and "nothing to do" in capsys.readouterr().out
    more = settings({"": "causal"}, draws=2)
    run.run_study(more)
    assert "random1" in ran and not any(name.endswith("knockout") for name in ran), (
        "the new draw has no partner"
    )
    (made.out / "trained/metrics.json").write_text('{"classes": [1]}')
    ran.failing = {}
    ran.clear()
    run.run_study(more)
    assert {"trained/knockout", "random0/knockout", "random1/knockout"} <= set(ran), (
        "other probes can have mistakes"
    )


def test_a_report_waits_for_that_of_another_job(settings, monkeypatch):
    """Jobs of a cluster, each of some arms, can end together; the second one failed."""
    made = settings({"": "causal"})
    (report,) = (step for step in plan(made).steps if step.kind == "report")
    wrote = threading.Event()
    monkeypatch.setattr("probes.studies.table.write_report", lambda options: wrote.set())
    job = threading.Thread(target=run._run_step, args=(made, report))
    with exclusive_run_lock(made.out, "report-step"):
        job.start()
        assert not wrote.wait(0.5)
    job.join(60)
    assert wrote.is_set()


def test_a_step_that_the_plan_left_out_is_recorded_and_returns_with_its_sites(settings, ran):
    some = settings({"": "causal"}, options=("--model.sites", "[encoder, adapter, layer_02]"))
    run.run_study(some)
    solved = ["random0", "permuted0", "adapter0"]
    assert ran == ["trained", "trained/sinks", "report", *solved, "report"]
    assert "layer_01" in unfinished_steps(some.out)[1]["reason"]
    ran.clear()
    run.run_study(some)
    assert not ran
    run.run_study(settings({"": "causal"}))
    assert {"trained/knockout", "random0/knockout", "report"} <= set(ran) and not unfinished_steps(
        some.out
    )
