"""`probes study` end to end: files, what is done again and what is not, resumption after kills, bad input."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import probe_runs
import pytest
import torch
from run_bytes import run_bytes
from safetensors.torch import load_file, save_file
from studies import study_of

import probes
from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.steps.record import MadeFrom, StepRecord
from probes.studies.estimate import print_estimate
from probes.studies.plan import choose_analyses, plan

OPTIONS = "-c configs/demo/probes.yaml --data.batch_size 2 --folds 2 --strengths 1e-1".split()
# what tests that are not about scores solve: the sites that a knockout needs
LITTLE_PROBES = {
    "data": {"batch_size": 2},
    "model": {"sites": ["adapter", "layer_01", "layer_02", "layer_03"]},
    "solver": {"folds": 2, "strengths": [1e-1]},
}


RANDOM = [f"{arm}{i}" for arm in ("random", "permuted", "adapter") for i in (0, 1)]
BYTES = ("metrics.json", "counts.safetensors", "effects.safetensors", "probes.safetensors")


class Photos(list):
    classes = ("sky",)


def arguments(models: list[str], data: Path, out: Path, *more: str) -> list[str]:
    own = ["--draws", "2", "--add", "knockout.draws=1", *OPTIONS]
    return ["study", *models, str(data), "--out", str(out), *own, *more]


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
        arms = finished / mask
        assert {path.name for path in arms.iterdir()} == {"trained", *RANDOM}
        for part in ("random", "permuted", "adapter"):
            draws = [load_file(arms / f"{part}{i}/counts.safetensors") for i in (0, 1)]
            assert not torch.equal(*(draw["intersection"] for draw in draws)), "draws differ"
        knockouts = [json.loads((arms / arm / "knockout.json").read_text()) for arm in RANDOM[:2]]
        knockouts.append(json.loads((arms / "trained/knockout.json").read_text()))
        classes = [[entry["class"] for entry in x["classes"]] for x in knockouts]
        assert classes[0] and classes == [classes[0]] * 3, "those of the trained model are blocked"
    results = json.loads((finished / "report/results.json").read_text())
    claims = {claim["claim"]: claim["verdicts"] for claim in results["claims"]}
    assert len(results["starvation"]["gap"]) == 4
    for name in ("recovery", "adapter_drop"):
        assert claims[name]["beyond_random"]["draws"] == 2
    table = probes.Study(finished).table()
    assert pd.read_parquet(finished / "table.parquet").equals(table)
    assert len(pd.read_csv(finished / "table.csv")) == len(table)


@pytest.mark.slow
def test_a_second_call_changes_no_byte(finished, checkpoints, segmentation, capsys):
    before = run_bytes(finished)
    main(arguments(both(checkpoints), segmentation, finished))
    assert "nothing to do" in capsys.readouterr().out
    assert run_bytes(finished) == before


@pytest.mark.slow
def test_the_trained_arm_is_a_run_of_solve(finished, checkpoints, segmentation, tmp_path):
    """Arms of one process must not leave anything to the next: random layers, hooks, seeds."""
    solve = ["solve", *OPTIONS, "--data.root", str(segmentation), "--model.mllm"]
    draw = ["--model.untrained", "[llm]", "--model.match", "update", "--model.draw", "1"]
    sites = ["--model.sites", "[adapter, layer_01, layer_02, layer_03, final_norm]"]
    for arm, more in {"trained": [], "random1": [*draw, *sites]}.items():
        main([*solve, str(checkpoints["bidirectional"]), *more, "--out", str(tmp_path / arm)])
        for name in BYTES:
            made = (finished / "bidirectional" / arm / name).read_bytes()
            assert made == (tmp_path / arm / name).read_bytes(), (arm, name)


@pytest.mark.slow
def test_the_table_answers_questions_in_one_line(finished):
    table = probes.Study(finished).table()
    causal = json.loads((finished / "causal/trained/metrics.json").read_text())
    of_causal = "metric == 'miou' and mask == 'causal' and weights == 'trained'"
    miou = table.query(of_causal).set_index("site")
    for site in causal["sites"]:
        row = miou.loc[site["site"]]
        assert [row.value, row.low, row.high] == [site["miou"], *site["miou_ci95"]]
    random = table.query("metric == 'miou' and weights == 'random'")
    assert set(random.draw) == {0, 1}
    assert "encoder" not in set(random.site)
    conditions = set(table.query("metric == 'wrong_patches_left'").condition)
    assert conditions >= {"none", "incorrect", "correct"}
    assert "adapter_drop" in probes.Study(finished)._repr_html_()


@pytest.fixture
def write(tmp_path):
    """Return a function that writes the trained arm of a model into a study."""
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["sky", "wall", "road"]}))

    def write(label: str, quality: list[float], **options) -> None:
        probe_runs.write_run(tmp_path / label / "trained", quality, root=tmp_path, **options)

    return write


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("mllm", [], ["after, causal, trained probes", "before, causal, trained probes"]),
        ("encoder", ["before", "after"], ["before, trained probes", "after, trained probes"]),
    ],
)
def test_models_of_one_name_are_told_apart_by_their_labels(kind, given, expected, write, tmp_path):
    """Exports of this project all end in hf. The order is that which the study was given."""
    for label in ("after", "before"):
        write(label, [0.6, 0.5, 0.6, 0.5], metrics={"model_kind": kind})
    made_from = MadeFrom({"labels": given}, inputs={})
    StepRecord("report", "report", tried=made_from, result=None, seconds=0.0).write(tmp_path)
    study = probes.Study(str(tmp_path))
    assert set(study.table()["model"]) == {"before", "after"}
    lines = study.plot().axes[0].get_lines()
    assert [line.get_label() for line in lines] == expected
    assert len({line.get_color() for line in lines}) == 2, "each model has its own colour"


def test_the_plot_has_each_site_in_its_place_and_each_line_its_own_label(write, tmp_path):
    """The final norm stood between layers, where lines folded back, and models of one folder's name had one label."""
    layers = [f"layer_{i:02d}" for i in range(1, 13)]
    deep = ["encoder", "adapter", *layers, "final_norm"]
    runs = {
        "other": ["adapter", *layers[:2], "final_norm"],
        "deep": deep,
        "shallow": ["encoder_03", "encoder", *layers[:6], "final_norm"],
    }
    for name, sites in runs.items():
        write(name, [0.5] * len(sites), sites=sites, encoder=name)
    axes = probes.Study(tmp_path).plot().axes[0]
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert names == ["encoder_03", *deep]
    lines = {line.get_label(): [*line.get_xdata()] for line in axes.get_lines()}
    expected = {f"{x} + vicuna-7b-v1.5, causal, trained probes": sites for x, sites in runs.items()}
    assert lines == {label: [*map(names.index, sites)] for label, sites in expected.items()}


def test_a_second_call_does_nothing_and_a_new_draw_no_more(settings, ran, capsys):
    one = settings(arms=("trained", "random0"))
    two = settings(arms=("trained", "random0", "random1"))
    first = ran.of(one)
    assert first.index("trained") < first.index("report") < first.index("random0")
    assert ran.of(one) == [] and "nothing to do" in capsys.readouterr().out
    assert {*ran.of(two)} == {"random1", "random1/knockout", "report"}
    (two.out / "random0/knockout.json").unlink()
    (two.out / "table.csv").unlink()
    assert ran.of(two) == ["random0/knockout", "report"]
    assert (two.out / "table.csv").is_file()


def test_a_folder_of_other_models_or_data_is_refused_before_any_work(settings, ran, capsys):
    """Arms of the second model were solved beside those of the first, and no report could be made of either."""

    def study(models: dict[str, str], arm: str = "trained"):
        return settings(models, arms=(arm,), only=("solve",))

    first = study({"": "causal"})
    assert ran.of(first) == ["trained"]
    before = run_bytes(first.out)
    for call in (ran.of, print_estimate):
        for models in ({"a": "causal", "b": "bidirectional"}, {"a": "causal"}):
            with pytest.raises(UserError, match="holds a study of .*; choose another --out"):
                call(study(models))
        for arm in ("trained", "random0"):
            with pytest.raises(UserError, match="trained, of .* belongs to a run with model.mllm/"):
                call(study({"": "bidirectional"}, arm))
        capsys.readouterr()
        call(first)
        assert capsys.readouterr().out == f"{first.out} is complete; nothing to do\n"
        assert ran == []
    assert run_bytes(first.out) == before


def test_a_study_whose_data_or_folder_were_moved_solves_nothing_again(
    checkpoints, segmentation, tmp_path, ran
):
    """By content, which is compared also for arms that are not solved yet."""

    def study(place: str, arm: str) -> list[str]:
        data, out = (tmp_path / place / name for name in ("data", "study"))
        models = {"": checkpoints["causal"]}
        return ran.of(study_of(models, data, out, only=("solve",), arms=(arm,)))

    shutil.copytree(segmentation, tmp_path / "first/data")
    assert study("first", "trained") == ["trained"]
    (tmp_path / "first").rename(tmp_path / "second")
    assert study("second", "trained") == []
    masks = sorted((tmp_path / "second/data/annotations/training").iterdir())
    masks[0].write_bytes(masks[1].read_bytes())
    with pytest.raises(UserError, match="data.training_masks=.*choose another --out"):
        study("second", "random0")
    assert ran == []


def test_a_dry_run_writes_nothing(checkpoints, segmentation, tmp_path, capsys):
    models = [str(checkpoints["causal"])]
    main(arguments(models, segmentation, tmp_path / "study", "--dry-run"))
    said = capsys.readouterr().out
    assert "random1/knockout" in said
    assert "7 of them passes over the images: 1 trained, 2 random, 2 permuted, 2 adapter" in said
    assert re.search(
        r"17 steps: about 0:.* \(solve 0:.*, position 0:.*, norms 0:.*, sinks 0:.*, knockout .*, report ",
        said,
    )
    assert not (tmp_path / "study").exists()


def test_the_counter_of_a_study_ends_where_the_dry_run_said(settings, ran, capsys):
    """The report is made twice, and steps that wait for it are counted once."""
    study = settings(draws=2)
    print_estimate(study)
    steps = int(re.search(r"(\d+) steps: about", capsys.readouterr().out)[1])
    names = ran.of(study)
    counters = re.findall(r"^\[(\d+)/(\d+)\]", capsys.readouterr().out, re.MULTILINE)
    assert len(names) == steps
    assert counters == [(str(i + 1), str(steps)) for i in range(steps)]


def test_without_weights_the_estimate_is_one_of_the_config(checkpoints, settings, tmp_path, capsys):
    folder = tmp_path / "config_only"
    shutil.copytree(checkpoints["causal"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    study = settings()
    print_estimate(replace(study, models={"": str(folder)}))
    said = capsys.readouterr().out
    assert "the time is not known here: " in said
    model = probes.load(checkpoints["causal"], device="cpu").model
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert f"config of {folder}: {parameters:.3g} billion parameters" in said


def test_a_model_that_cannot_read_the_images_is_an_error_of_the_dry_run_too(settings, monkeypatch):
    """It was "the time is not known here", and the study failed hours later."""

    def refuse(config):
        raise UserError("expected 32 pixels") from RuntimeError("sizes differ")

    monkeypatch.setattr("probes.solve.run.dry_run", refuse)
    with pytest.raises(UserError, match="expected 32 pixels"):
        print_estimate(settings())


BAD = {
    "MODEL nowhere": "neither a folder",
    "MODEL ade20k": "--data.root",
    "nowhere DATA": "nowhere",
    "MODEL DATA --arms trained random": "no arm 'random'",
    "MODEL DATA --add knockouts": "no analysis 'knockouts'",
    "MODEL DATA --add knockout.classes": "knockout.classes",
    "MODEL DATA --add knockout.classes=wall,unicorn": "no class 'unicorn'",
    # the model is not trained yet when slurm/submit.sh checks a study
    "nowhere DATA --add knockout.classes=unicorn": "no class 'unicorn'",
    "nowhere voc2012 --data.root DATA": "lacks JPEGImages",
    "MODEL EMPTY": "validation",
    "MODEL DATA --tasks dept": "no task 'dept'",
    "report=MODEL a=MODEL DATA": "'report' cannot be",
    "a/b=MODEL a=MODEL DATA": "'a/b' cannot be the label",
    "MODEL b=MODEL c=MODEL DATA": "has no label",
    "MODEL DATA --model.sites [encoder_03]": "unknown site 'encoder_03'; this model has encoder_00, ",
    "MODEL DATA --data.task depht": "there is no task 'depht'; expected one of segmentation",
    "MODEL DATA --model.untrained [llm]": r"model\.untrained.*--arms",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_error_before_any_work(words, checkpoints, segmentation, tmp_path, capsys):
    shutil.copytree(segmentation, tmp_path / "empty", ignore=lambda path, _: ["validation"])
    places = {"MODEL": checkpoints["causal"], "DATA": segmentation, "EMPTY": tmp_path / "empty"}
    expected = BAD[words]
    for name, path in places.items():
        words = words.replace(name, str(path))
    out = tmp_path / "study"
    with pytest.raises(SystemExit) as stop:
        main(["study", *words.split(), "--out", str(out)])
    assert re.search(expected, f"{stop.value}{capsys.readouterr().err}")
    assert not out.exists() or not any(out.rglob("*.json"))


def test_new_weights_replace_every_arm_also_after_an_interruption(
    checkpoints, segmentation, tmp_path, ran
):
    """A random arm of the old weights stayed beside the trained one of the new weights, and was compared with it."""
    model = shutil.copytree(checkpoints["causal"], tmp_path / "model")

    def study(*arms: str, overwrite: bool = False) -> list[str]:
        asked = {"arms": arms, "only": ("solve",), "overwrite": overwrite}
        return ran.of(study_of({"": model}, data=segmentation, out=tmp_path / "study", **asked))

    study("trained", "random0")
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "multi_modal_projector" in name)
    save_file(tensors | {name: tensors[name] * 2}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="--overwrite true"):
        study("trained", "random0")
    assert study("trained", overwrite=True) == ["trained"]
    with pytest.raises(UserError, match="random0.*--overwrite true"):
        study("trained", "random0")
    assert study("trained", "random0", overwrite=True) == ["random0"]


@pytest.mark.parametrize(
    ("text", "classes"),
    [('["wall, brick", sky]', ["wall, brick", "sky"]), ("wall,sky", ["wall", "sky"])],
)
def test_a_class_with_a_comma_is_one_class(text, classes, settings):
    study = settings(add=(f"knockout.classes={text}",))
    photos = SimpleNamespace(classes=["wall, brick", "wall", "sky"])
    assert choose_analyses(study, photos)["knockout"]["classes"] == classes


def test_of_few_photos_those_that_there_are_become_maps(settings):
    photos = Photos(["a", "b"])
    assert choose_analyses(settings(add=("maps",)), photos)["maps"]["image"] == [0, 1]


@pytest.mark.parametrize(
    ("given", "expected"), [("max_steps", (-1, 4, 316)), ("max_epochs", (4, None, None))]
)
def test_options_replace_those_of_the_papers_training(given, expected, settings):
    study = settings(fit=True, options=(f"--trainer.{given}", "4"))
    trainer = plan(study).arms[-1].config.trainer
    keys = ("max_epochs", "max_steps", "val_check_interval")
    assert tuple(map(trainer.get, keys)) == expected


def test_every_step_comes_after_what_it_needs(settings):
    models = {mask: mask for mask in ("causal", "bidirectional")}
    add = ("maps", "umap", "patching.draws=2")
    study = settings(models, draws=3, fit=True, tasks=("boundaries",), add=add)
    steps = plan(study).steps
    names = [step.name for step in steps]
    assert len({*names}) == len(names)
    assert names[-1] == "report"
    assert steps[-1].config.labels == ("causal", "bidirectional"), "as given"
    results = [step.result for step in steps]
    for i, step in enumerate(steps):
        assert all(results.index(file) < i for file in step.reads.values() if file in results)
        assert step.reads or step.kind in ("solve", "fit")
    last = {"causal/probes/maps", "causal/boundaries_random0", "bidirectional/probes/sinks"}
    assert last <= {*names}


def test_a_study_from_python(checkpoints, segmentation, tmp_path):
    study = probes.study(
        checkpoints["causal"],
        segmentation,
        out=tmp_path,
        draws=0,
        only=["solve"],
        configs=["configs/demo/probes.yaml"],
        options=LITTLE_PROBES,
    )
    assert set(study.table().run) == {"trained"}
    with pytest.raises(UserError, match="not finished"):
        study.claims()


@pytest.mark.slow
def test_an_analysis_that_finds_no_case_any_more_leaves_no_claims_behind(
    checkpoints, segmentation, tmp_path
):
    """The effects of the earlier options stood in the report, with verdicts."""

    def judged(*options: str, overwrite: bool = False) -> bool:
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
        return study.claims()["claim"].str.startswith("knockout").any()

    assert judged()
    assert not judged("knockout.min-patches=99", overwrite=True)


def test_each_draw_of_a_control_has_its_own_number(settings):
    """Two draws of one number would be one model, counted twice."""
    steps = plan(settings(draws=3, only=("solve",))).steps
    drawn = {step.name: step.config.model.draw for step in steps if step.config.model.untrained}
    counts = {"random": 3, "permuted": 2, "adapter": 3}
    assert drawn == {f"{arm}{i}": i for arm, count in counts.items() for i in range(count)}


def test_questions_are_asked_about_places_and_again_if_they_have_changed(
    checkpoints, segmentation, tmp_path
):
    data = shutil.copytree(segmentation, tmp_path / "a, b/data")  # a comma is part of a path
    models = {"": checkpoints["causal"]}
    settings = study_of(models, data, tmp_path / "study", draws=0, add=("routes",))
    questions = data.with_name("questions.json")

    def asked(content: str):
        questions.write_text(content)
        (step,) = [step for step in plan(settings).steps if step.kind == "routes"]
        assert step.config.questions == questions
        return step.inputs()["routes.questions"]

    with pytest.raises(UserError, match="--add routes needs .*questions.json"):
        asked("[]")
    assert asked('[{"regions": []}]') != asked('[{"regions": [1]}]')


def test_layers_of_the_encoder_are_read_by_the_trained_arm_alone(settings):
    """Random models share the encoder, so these sites would be solved again for the same states."""
    arms = ("trained", "random0", "permuted0", "adapter0", "untrained0")
    study = settings(arms=arms, options=("--model.sites", "all"))
    planned = {arm.name: arm.run.sites for arm in plan(study).arms}
    in_encoder = ["encoder_00", "encoder_01", "encoder_02", "encoder"]
    assert planned["trained"][:4] == in_encoder
    for arm in arms[1:]:
        assert planned[arm] and not any("encoder_" in site for site in planned[arm])
    solved = [step for step in plan(study).steps if step.kind == "solve"]
    assert [step.config.model.sites for step in solved[1:]] == [planned[arm] for arm in arms[1:]]
