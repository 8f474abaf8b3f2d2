"""Probes of subsets of the training images: which images they have, and that they are those of a run on these alone."""

from copy import copy

import pytest
import tiny_encoders
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import probes
from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json
from probes.analyses.learning_curve import ANALYSIS, check_sizes, lines, site_scores
from probes.cli import main
from probes.runs.read import ProbeRun
from probes.solve.subsets import SubsetRun, draw_subset

FOLDS = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> ProbeRun:
    """A solved run of a tiny encoder on 8 training images."""
    root = tmp_path_factory.mktemp("subsets")
    data = tiny_models.write_segmentation(root / "data", 8, 6, size=(32, 32))
    model = tiny_encoders.STOCK["dinov2"].write(root / "dinov2")
    options = f"--model.image_px 32 --trainer.accelerator cpu --folds {FOLDS} --data.batch_size 4"
    sites = "--model.sites=[layer_00,layer_02]"
    main(["solve", str(model), str(data), "--out", str(root / "run"), sites, *options.split()])
    return ProbeRun(root / "run")


@settings(max_examples=50)
@given(
    groups=st.lists(st.integers(0, 6), min_size=2, max_size=30),
    seed=st.integers(0, 99),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_subsets_are_nested_whole_groups_nearest_to_the_number(groups, seed, sizes):
    small, large = (draw_subset(groups, size, seed) for size in sorted(sizes))
    assert {*small} <= {*large}
    drawn = {groups[i] for i in large}
    assert large == [i for i, group in enumerate(groups) if group in drawn]
    every = {len(draw_subset(groups, size, seed)) for size in range(len(groups) + 1)}
    assert min(abs(count - max(sizes)) for count in every) == abs(len(large) - max(sizes))


def test_a_subset_has_the_probes_of_a_run_on_it_alone(run, tmp_path):
    """Beside another subset, with the strength that its folds choose: here those of all images are its own, too."""
    subset = [0, 1, 4, 5, 6, 7]
    counted = SubsetRun(run, tmp_path).count([[1, 2, 6], subset])
    mllm = run.mllm()
    training, validation = (run.dataset(split) for split in ("training", "validation"))

    def features(samples):
        states = mllm.states(mllm.preprocess([sample["image"] for sample in samples]), run.sites)
        return {site: x.unflatten(1, mllm.grid) for site, x in states.items()}

    samples = [training[i] for i in subset]
    masks = [sample["target"] for sample in samples]
    classes = len(run.metrics["classes"])
    own, seen = features(samples), features(validation)
    for number, site in enumerate(run.sites):
        probe = probes.solve_features(own[site], masks, classes, folds=FOLDS)
        right = []
        for sample, of_image in zip(validation, seen[site], strict=True):
            predicted = probe.predict(of_image[None], sample["target"].shape)[0]
            right.append(int((predicted == sample["target"]).sum()))
        ours = counted["intersection"][len(run.sites) + number].sum(1).tolist()
        assert ours == pytest.approx(right, abs=5)


@pytest.mark.nightly
def test_a_killed_call_resumes_and_other_subsets_do_not(run, tmp_path):
    first = SubsetRun(run, tmp_path)
    subsets = [[0, 1, 2, 3], [0, 1]]
    counted = first.count(subsets)
    again = SubsetRun(run, tmp_path)
    again.solve = None  # all sites are there
    assert torch.equal(again.count(subsets)["intersection"], counted["intersection"])
    with pytest.raises(UserError, match=r"subsets.images=\[\[0, 1, 2, 3\], \[0, 1\]\]"):
        SubsetRun(run, tmp_path).count([[4, 5]])


@pytest.mark.nightly
def test_the_curve_has_three_draws_of_each_size_and_ends_at_the_run(run, tmp_path):
    main(["learning_curve", str(run.path), "--images", "4", "all", "6", "--out", str(tmp_path)])
    results = read_json(tmp_path / ANALYSIS.result)
    rows = results["learning_curve"]
    places = [(row["images"], row["draw"], row["site"]) for row in rows]
    counts = [(n, draw) for n in (4, 6) for draw in range(3)] + [(8, 0)]
    assert places == [(*count, site) for count in counts for site in run.sites]
    scores = [row["score"] for row in rows[-len(run.sites) :]]
    assert scores == pytest.approx([entry["miou"] for entry in run.metrics["sites"]])
    assert len([*lines(results)]) == 4


def test_classes_of_the_mean_are_those_of_the_run(run):
    """A class without labels that the run predicts counts 0; one that a subset alone predicts does not count."""
    right, predicted, labelled = run.sums_at(run.sites).unflatten(-1, (3, -1)).unbind(-2)
    labelled[..., :2] = right[..., :2] = 0
    predicted[..., 0], predicted[..., 1] = 1, 0
    of_run = torch.cat([right, predicted, labelled], -1)
    other = predicted.clone()
    other[..., 0], other[..., 1] = 0, 7
    of_subset = torch.cat([right, other, labelled], -1)
    run = copy(run)
    run.sums_at = lambda sites: of_run
    of_run_rows, of_subset_rows = (list(site_scores(run, x)) for x in (of_run, of_subset))
    for first, second in zip(of_run_rows, of_subset_rows, strict=True):
        assert first["score"] == pytest.approx(second["score"])


@pytest.mark.parametrize("text", ["8", "1", "ten", "0.5"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UserError, match=f"--training_images {text}: expected numbers from 2 to 7"):
        check_sizes(("4", text), 8)
    assert check_sizes(("6", "all", "4", "6"), 8) == [4, 6]
