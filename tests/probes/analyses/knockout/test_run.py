"""The metric of App. C.1 against a slow loop written from the paper's text."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import reference
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from probes.analyses import run as run_analysis
from probes.analyses.knockout import KnockoutOptions, cases, complete, confused_classes
from probes.analyses.knockout.cases import CONDITIONS, PatchReader, outcome_key
from probes.cli import main
from probes.runs.read import ProbeRun

pytestmark = pytest.mark.numerics

L = 3
PREDICTED: dict[tuple, np.ndarray] = {}


@pytest.fixture(scope="module")
def run(checkpoints, runs, tmp_path_factory) -> ProbeRun:
    """A run of a model whose attention counts: a cut in any one layer changes the classes of patches."""
    folder = tmp_path_factory.mktemp("listening")
    model = shutil.copytree(checkpoints["bidirectional"], folder / "hf")
    file = model / "model.safetensors"
    weights = load_file(file)
    for name in weights:
        if "language_model" in name and "o_proj" in name:
            weights[name] = 64 * weights[name]
    save_file(weights, file, {"format": "pt"})
    root = runs["bidirectional"].manifest["data"]["root"]
    return probe_runs.fit(
        model,
        root,
        folder / "run",
        "--data.batch_size",
        "2",
    )


@pytest.fixture(scope="module")
def classes(run) -> list[str]:
    """Classes that patches of some image are wrongly predicted as."""
    reader = PatchReader(run)
    names = [name for k, name in enumerate(tiny_models.CLASSES) if c1_by_loop(run, reader, k)]
    assert names, "the fixture must confuse something"
    return names


def predicted(
    run,
    reader,
    image: int,
    blocked=None,
    layers=None,
) -> np.ndarray:
    """[L + 1, T] predicted class of each patch of one image, by an attention written out, once."""
    key = (run.path, image, str(blocked), str(layers))
    if key not in PREDICTED:
        mllm = reader.mllm
        first = mllm.prefix_ids.shape[1]

        def gone(layer, q, k) -> bool:
            cut = blocked is not None and (layers is None or layer in layers)
            return cut and min(q, k) >= first and blocked[k - first]

        masks = reference.masks_by_layer(mllm, mllm.ids.shape[1], gone)
        pixels = mllm.preprocess([run.dataset()[image]["image"]])
        states = reference.uncached_states(mllm, pixels, [], masks)
        after = [mllm.states(pixels, ["adapter"])["adapter"], *(x[:, first:] for x in states)]
        probes = [reader.probes[site] for site in ("adapter", "layer_01", "layer_02", "layer_03")]
        classes = [probe(x)[0].argmax(-1) for probe, x in zip(probes, after, strict=True)]
        PREDICTED[key] = torch.stack(classes).numpy()
    return PREDICTED[key]


def truth(run, image: int) -> list[int]:
    """The most frequent labelled class under each of the 2 x 2 patches."""
    target = run.dataset()[image]["target"]
    height, width = target.shape
    cells = [target[: height // 2, : width // 2], target[: height // 2, width // 2 :]]
    cells += [target[height // 2 :, : width // 2], target[height // 2 :, width // 2 :]]
    return [int(np.bincount(cell[cell != 255], minlength=3).argmax()) for cell in cells]


@torch.no_grad()
def c1_by_loop(
    run,
    reader,
    c: int,
    layers=None,
) -> dict[int, dict[str, dict[str, list[float]]]]:
    """Outcomes by image, condition of the paper and name."""
    outcomes = {}
    for image in range(len(run.dataset())):
        labels = predicted(run, reader, image)
        true = truth(run, image)
        wrong = [t for t in range(4) if labels[0][t] == c and true[t] != c]
        if not wrong:
            continue
        others = [true[t] for t in wrong]
        correct = min(set(others), key=lambda k: (-others.count(k), k))
        outcomes[image] = {}
        for condition, hidden in (("none", None), ("incorrect", c), ("correct", correct)):
            blocked = None if hidden is None else [bool(labels[0][t] == hidden) for t in range(4)]
            after = predicted(run, reader, image, blocked, layers)
            n = [sum(after[i][t] == c and true[t] != c for t in range(4)) for i in range(L + 1)]
            still = [sum(after[i][t] == c for t in wrong) / len(wrong) for i in range(L + 1)]
            outcomes[image][condition] = {"rate": [x / len(wrong) for x in n], "still_wrong": still}
    return outcomes


def plan(run: ProbeRun, out: Path, classes: list[str], **more) -> KnockoutOptions:
    return KnockoutOptions(probes=run.path, out=out, classes=tuple(classes), **more)


@pytest.mark.parametrize("options", [{}, {"layers": [2, 3]}], ids=["paper", "2 and 3"])
def test_equals_a_loop_over_images(
    run,
    classes,
    tmp_path,
    options,
):
    reader = PatchReader(run)
    run_analysis(plan(run, tmp_path, classes, batch_size=2, **options))
    results = json.loads((tmp_path / "knockout.json").read_text())
    tensors = load_file(tmp_path / "knockout.safetensors")
    changed = {
        torch.equal(tensors[f"{name}/none"], tensors[f"{name}/{condition}"])
        for name in classes
        for condition in ("incorrect", "correct")
    }
    assert False in changed, "else a knockout that does nothing would pass"
    for entry in results["classes"]:
        name = entry["class"]
        expected = c1_by_loop(run, reader, tiny_models.CLASSES.index(name), **options)
        assert tensors[f"{name}/image"].tolist() == list(expected)
        assert entry["images"] == len(expected)
        for condition in ("none", "incorrect", "correct"):
            for outcome in ("rate", "still_wrong"):
                values = np.array(
                    [by_condition[condition][outcome] for by_condition in expected.values()]
                )
                found = tensors[f"{name}/{outcome_key(outcome, condition)}"].numpy()
                np.testing.assert_allclose(found, values, atol=1e-6)
            rates = [by_condition[condition]["rate"] for by_condition in expected.values()]
            np.testing.assert_allclose(entry["remaining"][condition], np.mean(rates, 0), atol=1e-6)
            assert len(entry["ci95"][condition]) == L + 1
        assert all(
            entry["remaining"][condition][0] == pytest.approx(1.0) for condition in CONDITIONS
        )


def read_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("knockout*")}


def record_batches(monkeypatch, stop_after: int | None = None) -> list[list[int]]:
    """Record the images of each computed batch; interrupt the analysis at the batch after `stop_after`."""
    batches = []
    knock_out_batch = cases.knock_out_batch

    def spy(
        reader,
        plan,
        classes,
        samples,
    ):
        if len(batches) == stop_after:
            raise KeyboardInterrupt
        batches.append([*samples])
        return knock_out_batch(reader, plan, classes, samples)

    monkeypatch.setattr(cases, "knock_out_batch", spy)
    return batches


def test_same_seed_gives_the_same_files_also_after_a_kill(
    run,
    classes,
    tmp_path,
    monkeypatch,
):
    """A run killed in its third batch and started again computes only that batch."""
    argv = [
        "knockout",
        "--probes",
        str(run.path),
        "--classes",
        classes[0],
        "--batch-size",
        "4",
        "--draws",
        "2",
        "--out",
    ]
    main([*argv, str(tmp_path / "complete")])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        record_batches(patch, stop_after=2)
        main([*argv, str(tmp_path / "killed")])
    assert not (tmp_path / "killed/knockout.json").exists()
    again = record_batches(monkeypatch)
    main([*argv, str(tmp_path / "killed")])
    assert again == [[8]], "two of the three batches are cached"
    assert read_files(tmp_path / "complete") == read_files(tmp_path / "killed")
    assert set(read_files(tmp_path / "killed")) == {
        "knockout.json",
        "knockout.safetensors",
        "knockout_effects.safetensors",
    }


def test_another_plan_does_not_reuse_cached_batches(
    run,
    classes,
    tmp_path,
    monkeypatch,
):
    options = plan(run, tmp_path, classes, batch_size=5, draws=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        record_batches(patch, stop_after=1)
        run_analysis(options)
    again = record_batches(monkeypatch)
    run_analysis(dataclasses.replace(options, seed=1))
    assert again == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("sites", "missing"),
    [
        ("[encoder, adapter, layer_03]", "layer_01"),
        ("[layer_01, layer_02, layer_03]", "adapter"),
    ],
)
def test_a_run_without_all_layers_is_an_error_that_names_them(
    checkpoints,
    segmentation,
    tmp_path,
    sites,
    missing,
):
    """Layers are numbered by position, so another layer than the one of that number would be cut."""
    probe_runs.fit(
        checkpoints["causal"],
        segmentation,
        tmp_path,
        "--model.sites",
        sites,
    )
    with pytest.raises(
        SystemExit, match=rf"no probes at {missing}.*`--model.sites null` probes all"
    ):
        main(["knockout", "--probes", str(tmp_path), "--classes", "sky"])


def test_auto_ranks_classes_by_wrongly_predicted_pixels(run, capsys):
    site = run.sites.index("adapter")
    wrong = (run.counts.predicted - run.counts.intersection)[site].sum(0).tolist()
    ranked = sorted(tiny_models.CLASSES, key=lambda name: -wrong[tiny_models.CLASSES.index(name)])
    assert confused_classes(run, 3) == ranked
    assert len(set(wrong)) == 3
    main(["knockout", "--probes", str(run.path), "--classes", "auto:2"])
    assert f"most often wrongly predicted: {', '.join(ranked[:2])}" in capsys.readouterr().out
    assert [
        e["class"] for e in json.loads((run.path / "knockout.json").read_text())["classes"]
    ] == ranked[:2]


def test_a_control_blocks_what_the_trained_model_blocked(run, tmp_path):
    """Where there is no such file yet, it has classes of its own."""
    like = tmp_path / "trained.json"
    options = plan(run, tmp_path, ["auto:1"], like=like)
    assert complete(run, options).classes == (confused_classes(run, 1)[0],)
    names = [*reversed(tiny_models.CLASSES)]
    like.write_text(json.dumps({"classes": [{"class": name} for name in names]}))
    completed = complete(run, options)
    assert completed.classes == tuple(names)
    assert "like" not in completed.settings, "the classes say it"
