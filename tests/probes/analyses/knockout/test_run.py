"""The metric of App. C.1 against a slow loop written from the paper's text."""

import dataclasses
import json

import numpy as np
import probe_runs
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

import probes.analyses.knockout.run as analysis
from probes import Knockout
from probes.analyses.knockout.cases import PatchReader, confused_classes
from probes.analyses.knockout.config import Plan
from probes.analyses.knockout.effects import outcome_key
from probes.analyses.knockout.layer_sweep import cut_locations
from probes.analyses.knockout.run import knockout
from probes.analyses.knockout.schema import CONDITIONS
from probes.cli import main
from probes.results.probe_run import ProbeRun

pytestmark = pytest.mark.numerics

L = 3
PREDICTED: dict[tuple, np.ndarray] = {}


@pytest.fixture
def run(runs) -> ProbeRun:
    return runs["bidirectional"]


@pytest.fixture(scope="module")
def classes(runs) -> list[str]:
    """Classes that patches of some image are wrongly predicted as."""
    run = runs["bidirectional"]
    reader = PatchReader(run)
    names = [name for k, name in enumerate(tiny_models.CLASSES) if c1_by_loop(run, reader, k)]
    assert names, "the fixture must confuse something"
    return names


def predicted(run, reader, image: int, blocked=None, layers=None, heads=None) -> np.ndarray:
    """[L + 1, T] predicted class of each patch of one image, computed alone, once."""
    key = (run.path, image, str(blocked), str(layers), str(heads))
    if key not in PREDICTED:
        knockout = None if blocked is None else Knockout(torch.tensor(blocked)[None], layers, heads)
        pixels = reader.mllm.preprocess([run.dataset()[image]["image"]])
        PREDICTED[key] = reader.predict(pixels, knockout)[:, 0].numpy()
    return PREDICTED[key]


def truth(run, image: int) -> list[int]:
    """The most frequent labelled class under each of the 2 x 2 patches."""
    target = run.dataset()[image]["target"]
    height, width = target.shape
    cells = [target[: height // 2, : width // 2], target[: height // 2, width // 2 :]]
    cells += [target[height // 2 :, : width // 2], target[height // 2 :, width // 2 :]]
    return [int(np.bincount(cell[cell != 255], minlength=3).argmax()) for cell in cells]


def c1_by_loop(run, reader, c: int, block_set="predicted", layers=None, heads=None, keep_only=False) -> dict[int, dict]:
    """Remaining rates by image under the three conditions of the paper."""
    rates = {}
    for image in range(len(run.dataset())):
        labels, true = predicted(run, reader, image), truth(run, image)
        wrong = [t for t in range(4) if labels[0][t] == c and true[t] != c]
        if not wrong:
            continue
        others = [true[t] for t in wrong]
        correct = min(set(others), key=lambda k: (-others.count(k), k))
        rates[image] = {}
        for condition, blocked_class in (("none", None), ("incorrect", c), ("correct", correct)):
            blocked = None if blocked_class is None else [bool(labels[0][t] == blocked_class) for t in range(4)]
            if blocked and block_set == "correct":
                blocked = [blocked[t] and (true[t] == blocked_class) == (condition == "correct") for t in range(4)]
            if blocked and keep_only:
                blocked = [[q != k and not blocked[k] for k in range(4)] for q in range(4)]
            after = predicted(run, reader, image, blocked, layers, heads)
            n = [sum(after[i][t] == c and true[t] != c for t in range(4)) for i in range(L + 1)]
            rates[image][condition] = [x / len(wrong) for x in n]
    return rates


@pytest.mark.parametrize("options", [{}, {"block_set": "correct"}, {"layers": [2, 3]}], ids=["paper", "set", "layers"])
def test_equals_a_loop_over_images(run, classes, tmp_path, options):
    reader = PatchReader(run)
    results = knockout(run, Plan(classes, batch_size=2, **options), tmp_path)
    tensors = load_file(tmp_path / "knockout.safetensors")
    for entry in results["classes"]:
        name = entry["class"]
        expected = c1_by_loop(run, reader, tiny_models.CLASSES.index(name), **options)
        assert tensors[f"{name}/image"].tolist() == list(expected) and entry["images"] == len(expected)
        for condition in ("none", "incorrect", "correct"):
            rates = np.array([rates[condition] for rates in expected.values()])
            np.testing.assert_allclose(tensors[f"{name}/{condition}"].numpy(), rates, atol=1e-6)
            np.testing.assert_allclose(entry["remaining"][condition], rates.mean(0), atol=1e-6)
            assert len(entry["ci95"][condition]) == L + 1
        assert all(entry["remaining"][condition][0] == pytest.approx(1.0) for condition in CONDITIONS)


@torch.no_grad()
def outcomes_by_loop(run, reader, c: int, keep_own_key: bool) -> dict[int, dict[str, dict[str, list[float]]]]:
    """Return outcome by image, condition and name, from one forward per image and condition under explicit pairs."""
    outcomes = {}
    for image in range(len(run.dataset())):
        labels, true = predicted(run, reader, image)[0], truth(run, image)
        wrong = [t for t in range(4) if labels[t] == c and true[t] != c]
        if not wrong:
            continue
        others = [true[t] for t in wrong]
        correct = min(set(others), key=lambda k: (-others.count(k), k))
        both = [t for t in range(4) if labels[t] in (c, correct) and true[t] in (c, correct)]
        outcomes[image] = {}
        for condition, hidden in (("none", None), ("incorrect", c), ("correct", correct)):
            pairs = [[labels[k] == hidden and not (keep_own_key and q == k) for k in range(4)] for q in range(4)]
            pixels = reader.mllm.preprocess([run.dataset()[image]["image"]])
            states = reader.mllm.states(pixels, None, Knockout(torch.tensor([pairs])))
            logits = [reader.probes[site](states[site].float())[0].tolist() for site in run.layers]
            called = [[max(range(3), key=row.__getitem__) for row in layer] for layer in logits]
            share = lambda layer, k, patches: sum(layer[t] == k for t in patches) / len(patches)
            odds = [[layer[t][true[t]] - layer[t][c] for t in wrong] for layer in logits]
            outcomes[image][condition] = {
                "rate": [sum(layer[t] == c != true[t] for t in range(4)) / len(wrong) for layer in called],
                "still_wrong": [share(layer, c, wrong) for layer in called],
                "log_odds": [sum(layer) / len(layer) for layer in odds],
                "lean": [share(layer, c, both) - share(layer, correct, both) for layer in called],
            }
    return outcomes


@pytest.mark.parametrize("keep_own_key", [False, True])
def test_outcomes_equal_a_loop_over_patches(run, classes, tmp_path, keep_own_key):
    """With the own key kept, a blocked token attends to itself; with Eq. 1 it does not."""
    reader = PatchReader(run)
    results = knockout(run, Plan(classes, batch_size=7, keep_own_key=keep_own_key, draws=1), tmp_path)
    assert results["keep_own_key"] is keep_own_key
    tensors = load_file(tmp_path / "knockout.safetensors")
    for name in classes:
        expected = outcomes_by_loop(run, reader, tiny_models.CLASSES.index(name), keep_own_key)
        for condition in ("none", "incorrect", "correct"):
            for outcome in ("rate", "still_wrong", "log_odds", "lean"):
                values = np.array([by_condition[condition][outcome] for by_condition in expected.values()])
                key = f"{name}/{outcome_key(outcome, condition)}"
                np.testing.assert_allclose(tensors[key].numpy(), values, atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_keep_only_windows_and_heads_equal_the_loop_too(run, classes, tmp_path):
    """In batches that mix them with all other conditions."""
    reader, index = PatchReader(run), tiny_models.CLASSES.index
    knockout(run, Plan(classes, batch_size=7, keep_only=True, layer_windows=2, attention_heads=True, draws=1), tmp_path)
    tensors = load_file(tmp_path / "knockout.safetensors")
    swept = json.loads((tmp_path / "knockout_windows.json").read_text())
    base = {name: c1_by_loop(run, reader, index(name)) for name in classes}
    pooled, cases = swept["classes"][0], [image for by_image in base.values() for image in by_image]
    assert (pooled["cases"], pooled["images"]) == (len(cases), len(set(cases)))
    for name in classes:
        expected = c1_by_loop(run, reader, index(name), keep_only=True)
        for condition in ("incorrect", "correct"):
            rates = np.array([rates[condition] for rates in expected.values()])
            np.testing.assert_allclose(tensors[f"{name}/only_{condition}"].numpy(), rates, atol=1e-6)
    for i, place in enumerate(swept["places"]):
        heads = place["heads"] and [
            head + 1 for head in place["heads"]
        ]  # the file numbers them from 0, Knockout from 1
        location = {"layers": place["layers"], "heads": heads}
        cut = {name: c1_by_loop(run, reader, index(name), **location) for name in classes}
        for condition in ("incorrect", "correct"):
            change = [
                np.subtract(rates[condition], base[name][image]["none"])
                for name in classes
                for image, rates in cut[name].items()
            ]
            np.testing.assert_allclose(swept["classes"][0]["change"][condition][i], np.mean(change, 0), atol=1e-6)


def test_locations_of_windows_and_heads():
    places = cut_locations(2, True, 3, 2)
    layers = lambda kind: [place.layers for place in places if place.kind == kind]
    assert layers("single") == [[1], [2], [3]] and layers("sliding") == [[1, 2], [2, 3]]
    assert layers("from") == [[1, 2, 3], [2, 3], [3]] and layers("up_to") == [[1], [1, 2], [1, 2, 3]]
    heads = [(place.layers, place.heads) for place in places if place.kind == "head"]
    assert heads == [([1], [0]), ([1], [1]), ([2], [0]), ([2], [1]), ([3], [0]), ([3], [1])]


def test_layers_before_a_window_do_not_change(run, classes, tmp_path):
    knockout(run, Plan(classes, layer_windows=1, draws=1), tmp_path)
    swept = json.loads((tmp_path / "knockout_windows.json").read_text())
    for place, change in zip(swept["places"], swept["classes"][0]["change"]["correct"], strict=True):
        assert not any(change[: place["layers"][0]])


ALL = [
    "--controls",
    "distance",
    "mass",
    "matched",
    "high_norm",
    "--keep-own-key",
    "--fractions",
    "0.5",
    "--keep-only",
    "--layer-windows",
    "3",
]
ALL += ["--attention", "--draws", "2"]


def read_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("knockout*")}


def record_batches(monkeypatch, stop_after: int | None = None) -> list[list[int]]:
    """Record the images of each computed batch; interrupt the analysis at the batch after `stop_after`."""
    batches, knock_out_batch = [], analysis.knock_out_batch

    def spy(reader, plan, classes, batch):
        if len(batches) == stop_after:
            raise KeyboardInterrupt
        batches.append(batch["index"].tolist())
        return knock_out_batch(reader, plan, classes, batch)

    monkeypatch.setattr(analysis, "knock_out_batch", spy)
    return batches


def test_same_seed_gives_the_same_files_also_after_a_kill(run, classes, tmp_path, monkeypatch):
    """A run killed in its third batch and started again computes only that batch."""
    argv = ["knockout", "--probes", str(run.path), "--classes", classes[0], "--batch-size", "4", *ALL, "--out"]
    main([*argv, str(tmp_path / "complete")])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        record_batches(patch, stop_after=2)
        main([*argv, str(tmp_path / "killed")])
    assert not (tmp_path / "killed/knockout.json").exists()
    again = record_batches(monkeypatch)
    main([*argv, str(tmp_path / "killed")])
    assert again == [[8]], "two of the three batches are cached"
    assert read_files(tmp_path / "complete") == read_files(tmp_path / "killed")
    assert set(read_files(tmp_path / "killed")) == {"knockout.json", "knockout.safetensors", "knockout_windows.json"}


def test_a_knockout_without_windows_leaves_none_of_the_one_that_it_replaces(run, classes, tmp_path):
    argv = ["knockout", "--probes", str(run.path), "--classes", classes[0], "--draws", "1", "--out", str(tmp_path)]
    main([*argv, "--layer-windows", "1"])
    main([*argv, "--overwrite", "true"])
    assert set(read_files(tmp_path)) == {"knockout.json", "knockout.safetensors"}


def test_another_plan_does_not_reuse_cached_batches(run, classes, tmp_path, monkeypatch):
    plan = Plan(classes, batch_size=5, draws=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        record_batches(patch, stop_after=1)
        knockout(run, plan, tmp_path)
    again = record_batches(monkeypatch)
    knockout(run, dataclasses.replace(plan, seed=1), tmp_path)
    assert again == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]


def test_json_keys_of_the_plan_are_those_of_earlier_files(run):
    plan = Plan(["sky"], block_set="correct", fractions=[0.5], layer_windows=2).to_json()
    assert plan["labels_from"] == "adapter" and plan["anchors"] == "true" and plan["doses"] == [0.5]
    assert (plan["windows"], plan["heads"], plan["reverse"]) == (2, False, False)


@pytest.mark.parametrize(
    ("sites", "missing"),
    [
        ("[encoder, adapter, layer_03]", "layer_01"),
        ("[adapter, layer_01, layer_02]", "layer_03"),
        ("[layer_01, layer_02, layer_03]", "adapter"),
    ],
)
def test_a_run_without_all_layers_is_an_error_that_names_them(checkpoints, segmentation, tmp_path, sites, missing):
    """Layers are numbered by position, so another layer than the one of that number would be cut."""
    probe_runs.fit(checkpoints["causal"], segmentation, tmp_path, "--model.sites", sites)
    with pytest.raises(SystemExit, match=rf"no probes at {missing}.*`--model.sites null` probes all"):
        main(["knockout", "--probes", str(tmp_path), "--classes", "sky"])


def test_auto_ranks_classes_by_wrongly_predicted_pixels(run, capsys):
    site = run.sites.index("adapter")
    wrong = (run.counts.predicted - run.counts.intersection)[site].sum(0).tolist()
    ranked = sorted(tiny_models.CLASSES, key=lambda name: -wrong[tiny_models.CLASSES.index(name)])
    assert confused_classes(run, 3) == ranked and len(set(wrong)) == 3
    main(["knockout", "--probes", str(run.path), "--classes", "auto:2"])
    assert f"most often wrongly predicted: {', '.join(ranked[:2])}" in capsys.readouterr().out
    assert [e["class"] for e in json.loads((run.path / "knockout.json").read_text())["classes"]] == ranked[:2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--classes", "moon"], "unknown class 'moon'; .* has sky, wall, road"),
        (["--classes", "sky", "wall", "sky"], "class 'sky' is named twice"),
        (["--classes", "sky", "--block-by", "layer_9"], "unknown block_by site 'layer_9'"),
        (["--classes", "sky", "wall", "--min-patches", "5"], "no image has 5 or more patches wrongly .* sky or wall;"),
        (["--classes", "auto:9"], "--classes auto:9: expected N from 1 to 3"),
        (["--classes", "auto:many"], "--classes auto:many: expected class names, or auto:N"),
        (["--classes", "auto:1", "sky"], "--classes auto:1 sky: expected class names, or auto:N"),
        (["--classes", "sky", "--layer-windows", "4"], "layer windows 4: the width must be from 1 to 3"),
        (["--classes", "sky", "--layers", "0"], "layer 0 is out of range; .* has layers 1..3"),
        (["--classes", "sky", "--fractions", "1.5"], "fractions must be between 0 and 1, got 1.5"),
        (["--classes", "sky", "--draws", "0"], "draws must be at least 1, got 0"),
        (["--classes", "sky", "--limit", "0"], "limit must be at least 1, got 0"),
    ],
)
def test_bad_usage_is_an_error_in_one_line(run, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=f"^probes: .*{message}"):
        main(["knockout", "--probes", str(run.path), "--out", str(tmp_path), *argv])
    assert not list(tmp_path.glob("knockout*"))
