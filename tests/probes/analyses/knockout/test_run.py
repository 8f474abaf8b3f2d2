"""The C.1 metric against a slow loop written from the paper's text."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

import probes.analyses.knockout.run as analysis
from probes import Knockout
from probes.analyses.knockout.cases import PatchReader, confused_classes
from probes.analyses.knockout.conditions import CONDITIONS
from probes.analyses.knockout.config import Plan
from probes.analyses.knockout.effects import read_cases
from probes.analyses.knockout.layer_sweep import places_of
from probes.analyses.knockout.run import knockout
from probes.cli import main
from probes.results.probe_run import ProbeRun

L = 3
PREDICTED: dict[tuple, np.ndarray] = {}


@pytest.fixture(scope="module")
def run(checkpoints, tmp_path_factory) -> ProbeRun:
    """A run on pictures whose patches are often confused."""
    root = tiny_models.write_segmentation(tmp_path_factory.mktemp("data"), training=4, validation=9, seed=5)
    out = tmp_path_factory.mktemp("run")
    main(
        ["fit", "-c", "configs/demo/probes.yaml", "--out", str(out), "--trainer.max_epochs", "1"]
        + ["--model.mllm", str(checkpoints["bidirectional"]), "--data.root", str(root), "--data.batch_size", "2"]
    )
    return ProbeRun(out)


def predicted(run, reader, image: int, blocked=None, layers=None, heads=None) -> np.ndarray:
    """[L + 1, T] predicted class of each patch of one image, computed by itself, once."""
    key = (run.path, image, str(blocked), str(layers), str(heads))
    if key not in PREDICTED:
        PREDICTED[key] = _predicted(run, reader, image, blocked, layers, heads)
    return PREDICTED[key]


def _predicted(run, reader, image, blocked, layers, heads) -> np.ndarray:
    sample = run.dataset()[image]
    cut = None if blocked is None else Knockout(torch.tensor(blocked)[None], layers, heads)
    return reader.predict(reader.mllm.preprocess([sample["image"]]), cut)[:, 0].numpy()


def truth(run, image: int) -> list[int]:
    """The most frequent labelled class under each of the 2 x 2 patches."""
    target = run.dataset()[image]["target"]
    height, width = target.shape
    cells = [target[: height // 2, : width // 2], target[: height // 2, width // 2 :]]
    cells += [target[height // 2 :, : width // 2], target[height // 2 :, width // 2 :]]
    return [int(np.bincount(cell[cell != 255], minlength=3).argmax()) for cell in cells]


def c1_by_loop(run, reader, c: int, anchors="predicted", layers=None, heads=None, reverse=False) -> dict[int, dict]:
    """Remaining rates by image under the three conditions of the paper, all else left alone."""
    found = {}
    for image in range(len(run.dataset())):
        labels, real = predicted(run, reader, image), truth(run, image)
        wrong = [t for t in range(4) if labels[0][t] == c and real[t] != c]
        if not wrong:
            continue
        others = [real[t] for t in wrong]
        correct = min(set(others), key=lambda k: (-others.count(k), k))
        rates = {}
        for condition, blocked_class in (("none", None), ("incorrect", c), ("correct", correct)):
            blocked = None if blocked_class is None else [bool(labels[0][t] == blocked_class) for t in range(4)]
            if blocked and anchors == "true":
                right = condition == "correct"
                blocked = [blocked[t] and (real[t] == blocked_class) == right for t in range(4)]
            if blocked and reverse:
                blocked = [[q != k and not blocked[k] for k in range(4)] for q in range(4)]
            after = predicted(run, reader, image, blocked, layers, heads)
            n = [sum(after[i][t] == c and real[t] != c for t in range(4)) for i in range(L + 1)]
            rates[condition] = [x / len(wrong) for x in n]
        found[image] = rates
    return found


def confused(run) -> list[str]:
    """Classes that some image is wrongly called."""
    reader = PatchReader(run)
    return [name for k, name in enumerate(tiny_models.CLASSES) if c1_by_loop(run, reader, k)]


@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({}, {}),
        ({"anchors": "true"}, {"anchors": "true"}),
        ({"layers": [2, 3]}, {"layers": [2, 3]}),
    ],
    ids=["paper", "true anchors", "window"],
)
def test_equals_a_loop_over_images(run, tmp_path, options, loop):
    reader, classes = PatchReader(run), confused(run)
    assert classes, "the fixture must confuse something"
    facts = knockout(run, Plan(classes, batch_size=2, **options), tmp_path)
    tensors = load_file(tmp_path / "knockout.safetensors")
    for entry in facts["classes"]:
        name = entry["class"]
        expected = c1_by_loop(run, reader, tiny_models.CLASSES.index(name), **loop)
        assert tensors[f"{name}/image"].tolist() == list(expected) and entry["images"] == len(expected)
        for condition in ("none", "incorrect", "correct"):
            rates = np.array([rates[condition] for rates in expected.values()])
            np.testing.assert_allclose(tensors[f"{name}/{condition}"].numpy(), rates, atol=1e-6)
            np.testing.assert_allclose(entry["remaining"][condition], rates.mean(0), atol=1e-6)
            assert len(entry["ci95"][condition]) == L + 1
        assert all(entry["remaining"][condition][0] == pytest.approx(1.0) for condition in CONDITIONS)


@pytest.mark.slow
def test_reverse_windows_and_heads_equal_the_loop_too(run, tmp_path):
    """In batches that mix them with everything else."""
    reader, classes = PatchReader(run), confused(run)
    plan = Plan(classes, batch_size=7, reverse=True, windows=2, heads=True, draws=1)
    knockout(run, plan, tmp_path)
    tensors = load_file(tmp_path / "knockout.safetensors")
    swept = json.loads((tmp_path / "knockout_windows.json").read_text())
    every = {name: c1_by_loop(run, reader, tiny_models.CLASSES.index(name)) for name in classes}
    for name in classes:
        expected = c1_by_loop(run, reader, tiny_models.CLASSES.index(name), reverse=True)
        for condition in ("incorrect", "correct"):
            rates = np.array([rates[condition] for rates in expected.values()])
            np.testing.assert_allclose(tensors[f"{name}/only_{condition}"].numpy(), rates, atol=1e-6)
    for i, place in enumerate(swept["places"]):
        where = {"layers": place["layers"], "heads": place["heads"]}
        cut = {name: c1_by_loop(run, reader, tiny_models.CLASSES.index(name), **where) for name in classes}
        for condition in ("incorrect", "correct"):
            change = [
                np.subtract(rates[condition], every[name][image]["none"])
                for name in classes
                for image, rates in cut[name].items()
            ]
            np.testing.assert_allclose(swept["classes"][0]["change"][condition][i], np.mean(change, 0), atol=1e-6)


def test_places_are_the_windows_by_name():
    places = places_of(2, True, 3, 2)
    layers = lambda kind: [place.layers for place in places if place.kind == kind]
    assert layers("single") == [[1], [2], [3]] and layers("sliding") == [[1, 2], [2, 3]]
    assert layers("from") == [[1, 2, 3], [2, 3], [3]] and layers("up_to") == [[1], [1, 2], [1, 2, 3]]
    heads = [(place.layers, place.heads) for place in places if place.kind == "head"]
    assert heads == [([1], [0]), ([1], [1]), ([2], [0]), ([2], [1]), ([3], [0]), ([3], [1])]


def test_layers_before_a_window_stay_as_they_are(run, tmp_path):
    knockout(run, Plan(confused(run), windows=1, draws=1), tmp_path)
    swept = json.loads((tmp_path / "knockout_windows.json").read_text())
    for place, change in zip(swept["places"], swept["classes"][0]["change"]["correct"], strict=True):
        assert not any(change[: place["layers"][0]])


ALL = ["--controls", "distance", "mass", "high_norm", "--doses", "0.5", "--reverse", "--windows", "3", "--attention"]
ALL += ["--draws", "2"]


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("knockout*")}


def test_same_seed_gives_the_same_files_also_after_a_kill(run, tmp_path, monkeypatch):
    """Of a run that dies in its third batch and is started again; what was done is not done again."""
    argv = ["knockout", "--probes", str(run.path), "--classes", confused(run)[0], "--batch-size", "4", *ALL, "--out"]
    main([*argv, str(tmp_path / "whole")])
    done, knock_out = [], analysis.knock_out

    def dying(reader, plan, classes, batch):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(batch["index"].tolist())
        return knock_out(reader, plan, classes, batch)

    monkeypatch.setattr(analysis, "knock_out", dying)
    with pytest.raises(KeyboardInterrupt):
        main([*argv, str(tmp_path / "killed")])
    assert not (tmp_path / "killed/knockout.json").exists()
    again = []
    monkeypatch.setattr(
        analysis, "knock_out", lambda *args: again.append(args[3]["index"].tolist()) or knock_out(*args)
    )
    main([*argv, str(tmp_path / "killed")])
    assert again == [[8]], "two of the three batches were there"
    assert files(tmp_path / "whole") == files(tmp_path / "killed")
    assert set(files(tmp_path / "whole")) == {"knockout.json", "knockout.safetensors", "knockout_windows.json"}


def test_another_plan_does_not_go_on_with_the_batches_of_one(run, tmp_path, monkeypatch):
    plan, knock_out, seen = Plan(confused(run), batch_size=5, draws=1), analysis.knock_out, []

    def spy(reader, plan, classes, batch):
        seen.append(batch["index"].tolist())
        if len(seen) == 2:
            raise KeyboardInterrupt
        return knock_out(reader, plan, classes, batch)

    monkeypatch.setattr(analysis, "knock_out", spy)
    with pytest.raises(KeyboardInterrupt):
        knockout(run, plan, tmp_path)
    knockout(run, dataclasses.replace(plan, seed=1), tmp_path)
    assert seen[2:] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]


def test_fewer_cases_with_more_patches(run):
    main(["knockout", "--probes", str(run.path), "--classes", confused(run)[0]])
    everything, more = read_cases(run, 1), read_cases(run, 2)
    assert more is None or len(more.images) <= len(everything.images)
    assert read_cases(run, 99) is None
    assert set(everything.rates) == set(CONDITIONS)


def test_auto_ranks_classes_by_wrongly_predicted_pixels(run, capsys):
    site = run.sites.index("adapter")
    wrong = (run.counts.predicted - run.counts.intersection)[site].sum(0).tolist()
    ranked = sorted(tiny_models.CLASSES, key=lambda name: -wrong[tiny_models.CLASSES.index(name)])
    assert confused_classes(run, 3) == ranked and len(set(wrong)) == 3
    main(["knockout", "--probes", str(run.path), "--classes", "auto:2"])
    assert f"where they are not: {', '.join(ranked[:2])}" in capsys.readouterr().out
    assert [e["class"] for e in json.loads((run.path / "knockout.json").read_text())["classes"]] == ranked[:2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--classes", "moon"], "unknown class 'moon'; .* has sky, wall, road"),
        (["--classes", "sky", "--labels-from", "layer_9"], "unknown labels_from 'layer_9'"),
        (
            ["--classes", "sky", "wall", "--min-patches", "5"],
            "no image has 5 or more patches wrongly predicted any of sky",
        ),
        (["--classes", "auto:9"], r"--classes auto:9: N must lie within 1..3"),
        (["--classes", "auto:many"], "expected auto:N with a whole number N"),
        (["--classes", "auto:1", "sky"], "takes names or auto:1, not both"),
        (["--classes", "sky", "--windows", "4"], "windows 4: the width must lie within 1..3"),
        (["--classes", "sky", "--layers", "0"], "layer 0 is out of range; .* has layers 1..3"),
        (["--classes", "sky", "--doses", "1.5"], "a dose is a fraction between 0 and 1, got 1.5"),
        (["--classes", "sky", "--draws", "0"], "draws must be at least 1, got 0"),
    ],
)
def test_bad_usage_is_an_error_in_one_line(run, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=f"^probes: .*{message}"):
        main(["knockout", "--probes", str(run.path), "--out", str(tmp_path), *argv])
    assert not list(tmp_path.glob("knockout*"))
