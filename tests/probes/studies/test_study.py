"""`probes study` end to end: files, what is done again and what is not, resumption after kills, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import probe_runs
import pytest
import task_runs
import torch
from processes import HANGING_S
from run_bytes import run_bytes
from safetensors.torch import load_file, save_file
from studies import study_of

import probes
from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.steps import Step
from probes.studies.arms import plan_arms
from probes.studies.plan import choose_analyses, plan

OPTIONS = [
    "-c",
    "configs/demo/probes.yaml",
    "--data.batch_size",
    "2",
    "--folds",
    "2",
    "--strengths",
    "1e-3",
    "1e-1",
]
LITTLE = [
    "--model.sites",
    "[adapter, layer_01, layer_02, layer_03]",
    "--strengths",
    "1e-1",
]  # what tests that are not about scores solve: the sites that a knockout needs
PARTS = ["--draws", "2", "--add", "knockout.draws=1"]
# The same as values
PROBES = {"data": {"batch_size": 2}, "solver": {"folds": 2, "strengths": [1e-3, 1e-1]}}
LITTLE_PROBES = {
    **PROBES,
    "model": {"sites": ["adapter", "layer_01", "layer_02", "layer_03"]},
    "solver": {"folds": 2, "strengths": [1e-1]},
}


def arguments(
    models: list[str],
    data: Path,
    out: Path,
    *more: str,
) -> list[str]:
    return ["study", *models, str(data), "--out", str(out), *PARTS, *OPTIONS, *more]


def both(checkpoints) -> list[str]:
    return [f"{mask}={checkpoints[mask]}" for mask in ("causal", "bidirectional")]


@pytest.fixture(scope="module")
def finished(checkpoints, segmentation, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study") / "study"
    main(arguments(both(checkpoints), segmentation, out))
    return out


@pytest.mark.slow
def test_a_study_has_arms_analyses_report_and_table(finished):
    for mask in ("causal", "bidirectional"):
        for arm in ("trained", "random0", "random1", "adapter0", "adapter1"):
            assert (finished / mask / arm / "metrics.json").is_file()
        assert (finished / mask / "trained/knockout.json").is_file()
        for part in ("random", "adapter"):
            draws = [load_file(finished / mask / f"{part}{i}/counts.safetensors") for i in (0, 1)]
            assert not torch.equal(*(draw["intersection"] for draw in draws)), "draws differ"
        classes = [
            [
                entry["class"]
                for entry in json.loads((finished / mask / arm / "knockout.json").read_text())[
                    "classes"
                ]
            ]
            for arm in ("trained", "random0", "random1")
        ]
        assert classes[0] and classes[0] == classes[1] == classes[2], (
            "controls block the classes of the trained model"
        )
    found = json.loads((finished / "report/results.json").read_text())
    claims = {claim["claim"]: claim["verdicts"] for claim in found["claims"]}
    assert len(found["starvation"]["gap"]) == 4
    assert (
        claims["recovery"]["beyond_random"]["draws"]
        == claims["adapter_drop"]["beyond_random"]["draws"]
        == 2
    )
    assert pd.read_parquet(finished / "table.parquet").equals(probes.Study(finished).table())
    assert len(pd.read_csv(finished / "table.csv")) == len(probes.Study(finished).table())


@pytest.mark.slow
def test_the_trained_arm_is_a_run_of_solve(
    finished,
    checkpoints,
    segmentation,
    tmp_path,
):
    """Arms of one process must not leave anything to the next: random layers, hooks, seeds."""
    solve = ["solve", *OPTIONS, "--data.root", str(segmentation), "--model.mllm"]
    draw = ["--model.untrained", "[llm]", "--model.match", "update", "--model.draw", "1"]
    sites = ["--model.sites", "[adapter, layer_01, layer_02, layer_03, final_norm]"]
    for arm, more in {"trained": [], "random1": [*draw, *sites]}.items():
        main([*solve, str(checkpoints["bidirectional"]), *more, "--out", str(tmp_path / arm)])
        for name in (
            "metrics.json",
            "counts.safetensors",
            "effects.safetensors",
            "probes.safetensors",
        ):
            made = (finished / "bidirectional" / arm / name).read_bytes()
            assert made == (tmp_path / arm / name).read_bytes(), (arm, name)


@pytest.mark.slow
def test_the_table_answers_questions_in_one_line(finished):
    table = probes.Study(finished).table()
    causal = json.loads((finished / "causal/trained/metrics.json").read_text())
    miou = table.query("metric == 'miou' and mask == 'causal' and weights == 'trained'").set_index(
        "site"
    )
    for site in causal["sites"]:
        row = miou.loc[site["site"]]
        assert [row.value, row.low, row.high] == [site["miou"], *site["miou_ci95"]]
    random = table.query("metric == 'miou' and weights == 'random'")
    assert set(random.draw) == {0, 1}
    assert "encoder" not in set(random.site)
    assert set(table.query("metric == 'wrong_patches_left'").condition) >= {
        "none",
        "incorrect",
        "correct",
    }
    claims = probes.Study(finished).claims()
    assert {"label", "claim", "conclusion", "optimum_verdict", "beyond_value"} <= set(
        claims.columns
    )
    assert "adapter_drop" in probes.Study(finished)._repr_html_()


@pytest.mark.slow
def test_claims_have_the_effect_that_their_conclusion_is_about(finished):
    """Without trained probes there is no other one; as drawn, it may exceed a point where the conclusion does not."""
    results = json.loads((finished / "report/results.json").read_text())
    table = probes.Study(finished).claims().set_index(["claim", "mask"])
    judged = 0
    for claim in results["claims"]:
        row = table.loc[(claim["claim"], claim["image_attention"])]
        optimum = claim["verdicts"]["optimum"]
        beyond = claim["verdicts"]["beyond_random"]
        if optimum["ci95"] is not None:
            assert [row["low"], row["high"]] == optimum["ci95"]
            assert row["value"] == optimum["value"]
            judged += 1
        if beyond["ci95"] is not None:
            assert [row["beyond_low"], row["beyond_high"]] == beyond["ci95"]
    assert judged


def test_models_of_one_name_are_told_apart_by_their_labels(tmp_path):
    """Exports of this project all end in hf."""
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["sky", "wall", "road"]}))
    for label in ("first", "second"):
        out = tmp_path / label / "trained"
        probe_runs.write_run(out, [0.6, 0.5, 0.6, 0.5], root=tmp_path)
    table = probes.Study(tmp_path).table()
    assert set(table["model"]) == {"first", "second"}
    assert table.equals(probes.Study(str(tmp_path)).table())
    lines = probes.Study(tmp_path).plot().axes[0].get_lines()
    assert [line.get_label() for line in lines] == [
        "first, causal, trained probes",
        "second, causal, trained probes",
    ]
    assert len({line.get_color() for line in lines}) == 2, "each model has its own colour"


def test_the_plot_has_the_labels_and_the_order_that_the_study_was_given(tmp_path):
    """Of encoders, whose mask is not named."""
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["sky", "wall", "road"]}))
    for label in ("after", "before"):
        metrics = {"model_kind": "encoder", "mllm": f"models/{label}_folder"}
        probe_runs.write_run(
            tmp_path / label / "trained", [0.6, 0.5, 0.6, 0.5], root=tmp_path, metrics=metrics
        )
    record = {"config": {"labels": ["before", "after"]}}
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps/report.json").write_text(json.dumps(record))
    lines = probes.Study(tmp_path).plot().axes[0].get_lines()
    assert [line.get_label() for line in lines] == [
        "before, trained probes",
        "after, trained probes",
    ]


def test_a_second_call_does_nothing_and_a_new_draw_no_more(
    checkpoints,
    segmentation,
    tmp_path,
    capsys,
):
    out = tmp_path / "study"

    def study(*arms: str) -> str:
        model = str(checkpoints["causal"])
        main(arguments([model], segmentation, out, *LITTLE, "--arms", "trained", *arms))
        return capsys.readouterr().out

    study("random0")
    before = run_bytes(out)
    assert "nothing to do" in study("random0")
    assert run_bytes(out) == before
    study("random0", "random1")
    after = run_bytes(out)
    assert {"random1/metrics.json", "random1/knockout.json"} <= after.keys()
    results = ("metrics.json", "safetensors", "knockout.json")
    assert all(after[name] == content for name, content in before.items() if name.endswith(results))
    assert set(probes.Study(out).table().query("weights == 'random'").draw) == {0, 1}
    (out / "random0/knockout.json").unlink()
    (out / "table.csv").unlink()
    said = study("random0", "random1")
    assert (out / "table.csv").is_file()
    assert "random0/knockout" in said
    assert "random1/knockout" not in said


def test_a_folder_of_other_models_or_data_is_refused_before_any_work(
    checkpoints, segmentation, tmp_path, capsys
):
    """Arms of the second model were solved beside those of the first, and no report could be made of either."""
    data = tmp_path / "data"
    shutil.copytree(segmentation, data)
    out = tmp_path / "study"
    causal, other = (str(checkpoints[mask]) for mask in ("causal", "bidirectional"))
    little = [*OPTIONS[:-3], "--model.sites", "[adapter, layer_03]", "--strengths", "1e-1"]

    def study(*models: str, more: tuple[str, ...] = (), arm: str = "trained") -> str:
        words = [*models, str(data), "--out", str(out), *little, "--only", "solve", "--arms", arm]
        main(["study", *words, *more])
        return capsys.readouterr().out

    study(causal)
    before = run_bytes(out)
    held = f"{out} holds a study of {causal}, and this one is of"
    made_from = f"trained, of {causal}, belongs to a run with model.mllm/"
    for dry in ((), ("--dry-run",)):
        for models, message in (
            ((f"a={causal}", f"b={other}"), f"{held} a={causal}, b={other}; choose another --out"),
            ((f"a={causal}",), f"{held} a={causal}; choose another --out"),
            ((other,), made_from),
        ):
            with pytest.raises(SystemExit, match=re.escape(message)):
                study(*models, more=dry)
        with pytest.raises(SystemExit, match=re.escape(made_from)):
            study(other, arm="random0", more=dry)
        assert study(causal, more=dry) == f"{out} is complete; nothing to do\n"
    assert run_bytes(out) == before


def test_a_study_whose_data_or_folder_were_moved_solves_nothing_again(
    checkpoints, segmentation, tmp_path, capsys
):
    """By content, which is compared also for arms that are not solved yet."""

    def study(place: str, arm: str) -> str:
        probes.study(
            checkpoints["causal"],
            tmp_path / place / "data",
            out=tmp_path / place / "study",
            only=["solve"],
            arms=[arm],
            options=LITTLE_PROBES | {"model": {"sites": ["adapter", "layer_03"]}},
            configs=["demo/probes"],
        )
        return capsys.readouterr().out

    shutil.copytree(segmentation, tmp_path / "first/data")
    study("first", "trained")
    (tmp_path / "first").rename(tmp_path / "second")
    assert study("second", "trained") == f"{tmp_path / 'second/study'} is complete; nothing to do\n"
    before = run_bytes(tmp_path / "second/study/trained")
    masks = sorted((tmp_path / "second/data/annotations/training").iterdir())
    masks[0].write_bytes(masks[1].read_bytes())
    with pytest.raises(UserError, match="data.training_masks=.*choose another --out"):
        study("second", "random0")
    assert run_bytes(tmp_path / "second/study/trained") == before


def test_a_dry_run_writes_nothing(
    checkpoints,
    segmentation,
    tmp_path,
    capsys,
):
    main(arguments([str(checkpoints["causal"])], segmentation, tmp_path / "study", "--dry-run"))
    said = capsys.readouterr().out
    assert "random1/knockout" in said
    assert "7 of them passes over the images: 1 trained, 2 random, 2 permuted, 2 adapter" in said
    assert "2 random and 2 permuted draws: an effect must exceed those of both by" in said
    assert "MB" in said and "7 arms: about 0:" in said
    assert not (tmp_path / "study").exists()


BAD = {
    "a data folder that does not exist": (["MODEL", "nowhere"], "neither a folder"),
    "a layout without its folder": (["MODEL", "ade20k"], "--data.root"),
    "a model that cannot be read": (["nowhere", "DATA"], "nowhere"),
    "an unknown arm": (["MODEL", "DATA", "--arms", "trained", "random"], "no arm 'random'"),
    "an unknown analysis": (["MODEL", "DATA", "--add", "knockouts"], "no analysis 'knockouts'"),
    "an analysis option without a value": (
        ["MODEL", "DATA", "--add", "knockout.classes"],
        "knockout.classes",
    ),
    "a class that does not exist": (
        ["MODEL", "DATA", "--add", "knockout.classes=wall,unicorn"],
        "no class 'unicorn'",
    ),
    "a split without images": (["MODEL", "EMPTY"], "validation"),
    "an unknown task": (["MODEL", "DATA", "--tasks", "dept"], "no task 'dept'"),
    "the name of a folder of the study": (
        ["report=MODEL", "a=MODEL", "DATA"],
        "'report' cannot be",
    ),
    "a path as a name": (["a/b=MODEL", "a=MODEL", "DATA"], "'a/b' cannot be the label"),
    "a model without a name": (["MODEL", "b=MODEL", "c=MODEL", "DATA"], "has no label"),
    "an unknown layer of the encoder": (
        ["MODEL", "DATA", "--model.sites", "[encoder_03]"],
        "unknown site 'encoder_03'; this model has encoder_00, .*final_norm",
    ),
    "a task that is none of the study's": (
        ["MODEL", "DATA", "--data.task", "depth"],
        "--tasks NAME",
    ),
    "weights that are an arm's": (
        ["MODEL", "DATA", "--model.untrained", "[llm]"],
        r"model\.untrained.*--arms",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_error_before_any_work(
    what,
    checkpoints,
    segmentation,
    tmp_path,
    capsys,
):
    words, expected = BAD[what]
    shutil.copytree(segmentation, tmp_path / "empty", ignore=lambda path, _: ["validation"])
    places = {
        "MODEL": checkpoints["causal"],
        "DATA": segmentation,
        "EMPTY": tmp_path / "empty",
    }

    def in_place(label, equals, name):
        return f"{label}{equals}{places.get(name, name)}"

    given = [in_place(*word.rpartition("=")) for word in words]
    out = tmp_path / "study"
    with pytest.raises(SystemExit) as stop:
        main(["study", *given, "--out", str(out)])
    assert re.search(expected, f"{stop.value}{capsys.readouterr().err}")
    assert not out.exists() or not any(out.rglob("*.json"))


@pytest.mark.slow
def test_changed_targets_of_a_task_end_the_study(checkpoints, segmentation, tmp_path):
    data = task_runs.write_targets(segmentation, tmp_path / "data")
    command = arguments(
        [str(checkpoints["causal"])],
        data,
        tmp_path / "study",
        "--arms",
        "trained",
        "--only",
        "solve",
        "--tasks",
        "depth",
    )
    main(command)
    depth = sorted((data / "depth/validation").iterdir())
    depth[0].write_bytes(depth[1].read_bytes())
    with pytest.raises(SystemExit, match="depth_trained.*validation_depth"):
        main(command)


def test_new_weights_replace_every_arm_also_after_an_interruption(
    checkpoints, segmentation, tmp_path
):
    """A random arm of the old weights stayed beside the trained one of the new weights, and was compared with it."""
    model = tmp_path / "model"
    shutil.copytree(checkpoints["causal"], model)
    out = tmp_path / "study"

    def study(*arms: str, overwrite: bool = False):
        probes.study(
            model,
            segmentation,
            out=out,
            overwrite=overwrite,
            arms=[*arms],
            only=["solve", "report"],
            configs=["demo/probes"],
            options=LITTLE_PROBES | {"model": {"sites": ["adapter", "layer_03"]}},
        )

    def weights_of(arm: str) -> dict:
        return probes.ProbeRun(out / arm).manifest["identity"]["model"]

    study("trained", "random0")
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "multi_modal_projector" in name)
    save_file(tensors | {name: tensors[name] * 2}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="--overwrite true"):
        study("trained", "random0")
    with pytest.raises(UserError, match="other weights"):
        study("trained", overwrite=True)
    assert weights_of("trained") != weights_of("random0")
    with pytest.raises(UserError, match="random0.*--overwrite true"):
        study("trained", "random0")
    study("trained", "random0", overwrite=True)
    assert weights_of("trained") == weights_of("random0")


@pytest.mark.parametrize(
    ("text", "classes"),
    [('["wall, brick", sky]', ["wall, brick", "sky"]), ("wall,sky", ["wall", "sky"])],
)
def test_a_class_with_a_comma_is_one_class(text, classes, segmentation, tmp_path):
    study = study_of({"": "model"}, segmentation, tmp_path, add=(f"knockout.classes={text}",))
    photos = SimpleNamespace(classes=["wall, brick", "wall", "sky"])
    assert choose_analyses(study, photos)["knockout"]["classes"] == classes


def test_every_step_comes_after_what_it_needs(checkpoints, segmentation, tmp_path):
    models = {mask: str(checkpoints[mask]) for mask in ("causal", "bidirectional")}
    tasks = ("boundaries",)
    add = ("maps", "umap", "patching.draws=2")
    steps = plan(
        study_of(
            models,
            str(segmentation),
            tmp_path,
            fit=True,
            tasks=tasks,
            add=add,
        )
    ).steps
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert names[-1] == "report"
    results = [step.result for step in steps]
    for i, step in enumerate(steps):
        assert all(results.index(file) < i for file in step.reads.values() if file in results)
        assert step.reads or step.kind in ("solve", "fit")
    assert {
        "causal/probes/maps",
        "causal/boundaries_random0",
        "bidirectional/probes/sinks",
    } <= set(names)


@pytest.mark.nightly
def test_kills_change_no_result(
    finished,
    checkpoints,
    segmentation,
    tmp_path,
):
    """kill -9 at five moments; then it is let finish."""
    out = tmp_path / "study"
    command = [sys.executable, "-m", "probes", *arguments(both(checkpoints), segmentation, out)]
    for seconds in (7, 9, 11, 13, 15):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running = subprocess.Popen(command, start_new_session=True, **quiet)
        time.sleep(seconds)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait(HANGING_S)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=HANGING_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for file in finished.rglob("*"):
        if file.name in (
            "probes.safetensors",
            "effects.safetensors",
            "metrics.json",
            "knockout.json",
        ):
            assert file.read_bytes() == (out / file.relative_to(finished)).read_bytes(), file


def test_a_study_from_python(checkpoints, segmentation, tmp_path):
    options = {
        "draws": 0,
        "only": ["solve"],
        "configs": ["configs/demo/probes.yaml"],
        "options": LITTLE_PROBES,
    }
    study = probes.study(checkpoints["causal"], segmentation, out=tmp_path, **options)
    assert set(study.table().run) == {"trained"}
    with pytest.raises(UserError, match="not finished"):
        study.claims()


def test_an_analysis_that_finds_no_case_any_more_leaves_no_claims_behind(
    checkpoints, segmentation, tmp_path
):
    """The effects of the earlier options stood in the report, with verdicts."""

    def judged(*options: str, overwrite: bool = False) -> set[str]:
        study = probes.study(
            checkpoints["causal"],
            segmentation,
            out=tmp_path,
            draws=0,
            only=["solve", "knockout", "report"],
            add=["knockout.classes=auto:2", *options],
            configs=["demo/probes"],
            options=LITTLE_PROBES,
            overwrite=overwrite,
        )
        claims = study.claims()
        return {name for name in claims["claim"] if name.startswith("knockout")}

    assert judged()
    assert not judged("knockout.min-patches=99", overwrite=True)
    assert judged(overwrite=True)
    with pytest.raises(UserError, match="has an earlier one: trained/knockout: layer 9"):
        judged("knockout.layers=9", overwrite=True)
    claims = probes.Study(tmp_path).claims()["claim"]
    assert not claims.str.startswith("knockout").any()


def test_two_models_are_compared_in_the_order_given(checkpoints, segmentation, tmp_path):
    model = str(checkpoints["causal"])
    settings = study_of({"zero": model, "after": model}, str(segmentation), tmp_path, draws=0)
    report = next(step.config for step in plan(settings).steps if step.kind == "report")
    assert report.labels == ("zero", "after")


def test_each_draw_of_a_control_has_its_own_number(checkpoints, segmentation, tmp_path):
    """Two draws of one number would be one model, counted twice."""
    settings = study_of({"": str(checkpoints["causal"])}, str(segmentation), tmp_path, draws=3)
    drawn = {}
    for step in plan(settings).steps:
        if step.kind == "solve" and step.config.model.untrained:
            drawn[step.name] = step.config.model.draw
    counts = {"random": 3, "permuted": 2, "adapter": 3}
    assert drawn == {f"{arm}{i}": i for arm, count in counts.items() for i in range(count)}


def test_questions_are_asked_about_places_and_again_if_they_have_changed(
    checkpoints, segmentation, tmp_path
):
    root = tmp_path / "a, b"  # a comma is part of a path
    shutil.copytree(segmentation, root / "data")
    settings = study_of(
        {"": str(checkpoints["causal"])},
        str(root / "data"),
        tmp_path / "study",
        draws=0,
        add=("routes",),
    )
    questions = root / "questions.json"

    def asked(content: str) -> list[Step]:
        questions.write_text(content)
        return [step for step in plan(settings).steps if step.kind == "routes"]

    with pytest.raises(UserError, match="--add routes needs .*questions.json"):
        asked("[]")
    (first,) = asked('[{"regions": []}]')
    assert first.config.questions == questions
    before = first.inputs()["routes.questions"]
    (second,) = asked('[{"regions": [1]}]')
    assert second.inputs()["routes.questions"] != before


@pytest.mark.parametrize("chosen", ["all", "[encoder_00, encoder_02, encoder, adapter, layer_02]"])
def test_layers_of_the_encoder_are_read_by_the_trained_arm_alone(
    chosen,
    checkpoints,
    segmentation,
    tmp_path,
):
    """Random models share the encoder, so these sites would be solved again for the same states."""
    arms = ("trained", "random0", "permuted0", "adapter0", "untrained0")
    settings = study_of(
        {"": str(checkpoints["causal"])},
        str(segmentation),
        tmp_path,
        arms=arms,
        options=("--model.sites", chosen),
    )
    planned = {arm.name: arm.run for arm in plan_arms(settings)}
    in_encoder = ["encoder_00", "encoder_01", "encoder_02"] if chosen == "all" else None
    in_encoder = in_encoder or ["encoder_00", "encoder_02"]
    assert planned["trained"].sites[: len(in_encoder)] == in_encoder
    assert planned["trained"].sites[len(in_encoder)] == "encoder"
    for arm in arms[1:]:
        assert planned[arm].sites and not any("encoder_" in site for site in planned[arm].sites)
    solved = [step for step in plan(settings).steps if step.kind == "solve"]
    assert [step.config.model.sites for step in solved[1:]] == [
        planned[arm].sites for arm in arms[1:]
    ]


def test_the_plot_has_each_site_in_its_place_and_each_line_its_own_label(tmp_path):
    """The final norm stood between layers, where lines folded back, and models of one folder's name had one label."""
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["sky", "wall", "road"]}))
    layers = [f"layer_{i:02d}" for i in range(1, 13)]
    deep = ["encoder", "adapter", *layers, "final_norm"]
    runs = {
        "other": ["adapter", *layers[:2], "final_norm"],
        "deep": deep,
        "shallow": ["encoder_03", "encoder", *layers[:6], "final_norm"],
    }
    for name, sites in runs.items():
        write = {"sites": sites, "encoder": name, "root": tmp_path}
        probe_runs.write_run(tmp_path / name / "trained", [0.5] * len(sites), **write)
    axes = probes.Study(tmp_path).plot().axes[0]
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert names == ["encoder_03", *deep]
    lines = {line.get_label(): [*line.get_xdata()] for line in axes.get_lines()}
    expected = {f"{x} + vicuna-7b-v1.5, causal, trained probes": sites for x, sites in runs.items()}
    assert lines == {label: [*map(names.index, sites)] for label, sites in expected.items()}
