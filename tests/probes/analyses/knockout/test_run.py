"""The metric of App. C.1 against a slow loop written from the paper's text."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CLASSES

from llava_bidir.common.errors import UserError
from probes.analyses import run as run_analysis
from probes.analyses.knockout import KnockoutOptions, complete, confused_classes
from probes.analyses.knockout.cases import CONDITIONS, PatchReader, outcome_key
from probes.runs.read import ProbeRun

pytestmark = pytest.mark.numerics

L = 3


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
    return probe_runs.fit(model, root, folder / "run", "--data.batch_size", "2")


@pytest.fixture(scope="module")
def reader(run) -> PatchReader:
    reader = PatchReader(run)
    reader.run = run
    return reader


@cache
def predicted(
    reader, image: int, blocked: tuple[bool, ...] = (), layers: tuple[int, ...] = (1, 2, 3)
) -> np.ndarray:
    """[L + 1, T] predicted class of each patch of one image, by an attention written out."""
    mllm = reader.mllm
    first = mllm.prefix_ids.shape[1]

    def gone(layer, q, k) -> bool:
        return bool(blocked) and layer in layers and min(q, k) >= first and blocked[k - first]

    masks = reference.masks_by_layer(mllm, mllm.ids.shape[1], gone)
    pixels = mllm.preprocess([reader.run.dataset()[image]["image"]])
    states = reference.uncached_states(mllm, pixels=pixels, text=[], masks=masks)
    after = [mllm.states(pixels, ["adapter"])["adapter"], *(x[:, first:] for x in states)]
    probes = [reader.probes[site] for site in reader.layers]
    classes = [probe(x)[0].argmax(-1) for probe, x in zip(probes, after, strict=True)]
    return torch.stack(classes).numpy()


def truth(run, image: int) -> list[int]:
    """The most frequent labelled class under each of the 2 x 2 patches."""
    target = run.dataset()[image]["target"]
    height, width = target.shape
    cells = [target[: height // 2, : width // 2], target[: height // 2, width // 2 :]]
    cells += [target[height // 2 :, : width // 2], target[height // 2 :, width // 2 :]]
    return [int(np.bincount(cell[cell != 255], minlength=3).argmax()) for cell in cells]


@torch.no_grad()
def c1_by_loop(reader, c: int, **options) -> dict[int, dict[str, dict[str, list[float]]]]:
    """Outcomes by image, condition of the paper and name."""
    outcomes = {}
    for image in range(len(reader.run.dataset())):
        labels = predicted(reader, image)
        true = truth(reader.run, image)
        wrong = [t for t in range(4) if labels[0][t] == c and true[t] != c]
        if not wrong:
            continue
        others = [true[t] for t in wrong]
        correct = min(set(others), key=lambda k: (-others.count(k), k))
        outcomes[image] = {}
        for condition, hidden in (("none", None), ("incorrect", c), ("correct", correct)):
            blocked = () if hidden is None else tuple(labels[0] == hidden)
            after = predicted(reader, image=image, blocked=blocked, **options)
            n = [sum(after[i][t] == c and true[t] != c for t in range(4)) for i in range(L + 1)]
            still = [sum(after[i][t] == c for t in wrong) / len(wrong) for i in range(L + 1)]
            outcomes[image][condition] = {"rate": [x / len(wrong) for x in n], "still_wrong": still}
    return outcomes


def plan(run: ProbeRun, out: Path, classes: list[str], **more) -> KnockoutOptions:
    return KnockoutOptions(probes=run.path, out=out, classes=tuple(classes), **more)


@pytest.mark.parametrize("options", [{}, {"layers": (2, 3)}], ids=["paper", "2 and 3"])
def test_equals_a_loop_over_images(run, reader, tmp_path, options):
    expected = {name: c1_by_loop(reader, k, **options) for k, name in enumerate(CLASSES)}
    classes = [name for name in CLASSES if expected[name]]
    assert classes, "the fixture must confuse something"
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
        assert tensors[f"{name}/image"].tolist() == list(expected[name])
        for condition in ("none", "incorrect", "correct"):
            for outcome in ("rate", "still_wrong"):
                values = [of_image[condition][outcome] for of_image in expected[name].values()]
                found = tensors[f"{name}/{outcome_key(outcome, condition)}"].numpy()
                np.testing.assert_allclose(found, values, atol=1e-6)
            rates = [of_image[condition]["rate"] for of_image in expected[name].values()]
            np.testing.assert_allclose(entry["remaining"][condition], np.mean(rates, 0), atol=1e-6)
        for condition in CONDITIONS:
            assert entry["remaining"][condition][0] == pytest.approx(1.0)


def test_a_run_without_all_layers_is_an_error_that_names_them(segmentation, tmp_path):
    """Layers are numbered by position, so another layer than the one of that number would be cut."""
    sites = ["encoder", "adapter", "layer_03"]
    path = probe_runs.write_run(tmp_path / "run", [0.5, 0.4, 0.6], root=segmentation, sites=sites)
    run = ProbeRun(path)
    with pytest.raises(UserError, match="no probes at layer_01.*`--model.sites null` probes all"):
        complete(run, plan(run, tmp_path, ["sky"]))


def test_auto_ranks_classes_by_wrongly_predicted_pixels(run):
    site = run.sites.index("adapter")
    wrong = (run.counts.predicted - run.counts.intersection)[site].sum(0).tolist()
    ranked = sorted(CLASSES, key=lambda name: -wrong[CLASSES.index(name)])
    assert confused_classes(run, 3) == ranked
    assert len(set(wrong)) == 3
    assert complete(run, plan(run, run.path, ["auto:2"])).classes == (*ranked[:2],)


def test_a_control_blocks_what_the_trained_model_blocked(run, tmp_path):
    """Where there is no such file yet, it has classes of its own."""
    like = tmp_path / "trained.json"
    options = plan(run, tmp_path, ["auto:1"], like=like)
    assert complete(run, options).classes == (confused_classes(run, 1)[0],)
    names = [*reversed(CLASSES)]
    like.write_text(json.dumps({"classes": [{"class": name} for name in names]}))
    completed = complete(run, options)
    assert completed.classes == tuple(names)
    assert "like" not in completed.settings, "the classes say it"
