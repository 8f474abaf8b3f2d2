"""Accuracy by patch: with the classes held fixed, and with the images turned."""

import json

import numpy as np
import pytest
import tiny_models
import torch

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.analyses.starvation import flipped
from probes.analyses.starvation.by_class import standardised
from probes.analyses.starvation.flipped import FLIPS, Turned, flip_facts, score_patches, turned_patches
from probes.analyses.starvation.patch_accuracy import PatchCounts, accuracies, gap_of
from probes.analyses.starvation.run import starvation
from probes.cli import main
from probes.results.probe_run import ProbeRun

N, T, K = 80, 16, 3


@pytest.fixture(scope="module")
def runs(checkpoints, tmp_path_factory) -> dict[str, ProbeRun]:
    root = tiny_models.write_segmentation(
        tmp_path_factory.mktemp("data"), training=4, validation=9, size=(23, 30), seed=5
    )
    found = {}
    for mask in ("causal", "bidirectional"):
        out = tmp_path_factory.mktemp(mask)
        main(
            ["fit", "-c", "configs/demo/probes.yaml", "--out", str(out), "--trainer.max_epochs", "1"]
            + ["--model.mllm", str(checkpoints[mask]), "--data.root", str(root), "--data.batch_size", "2"]
        )
        found[mask] = ProbeRun(out)
    return found


def pair_of(gap: torch.Tensor, seed: int = 0) -> dict[str, PatchCounts]:
    """Counts of 100 pixels a patch in which bidirectional is better by `gap`, f[T] or f[N, T]."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.full((N, T), 100.0, dtype=torch.double)
    noise = lambda: torch.randn(N, T, generator=generator, dtype=torch.double)
    return {"causal": PatchCounts(50 + noise(), valid), "bidirectional": PatchCounts(50 + 100 * gap + noise(), valid)}


def test_the_frozen_probe_on_the_images_as_they_are_gives_the_runs_own_counts(runs):
    for site in ("encoder", "layer_02", "final_norm"):
        run = runs["causal"]
        counts = score_patches(run, site, run.dataset(), batch_size=4)
        assert torch.equal(counts.right, run.counts.patch_right[run.sites.index(site)].double())
        assert torch.equal(counts.valid, run.counts.patch_valid.double())


@pytest.mark.parametrize("flip", FLIPS)
def test_turned_images_and_patches_go_together(runs, flip):
    """A patch's pixels are found again, mirrored, where the patch is said to go; twice turned is as before."""
    upright, turned = runs["causal"].dataset(), Turned(runs["causal"].dataset(), flip)
    before, after, goes_to = upright[3], turned[3], turned_patches((2, 2), flip)
    cells = lambda mask: [half for part in np.array_split(mask[:22], 2) for half in np.array_split(part, 2, axis=1)]
    target = before["target"][:22]
    again = Turned([{**before, "target": target}], flip)[0]["target"]
    for patch, pixels in enumerate(cells(target)):
        assert np.array_equal(np.sort(pixels.ravel()), np.sort(cells(again)[goes_to[patch]].ravel()))
    twice = Turned(turned, flip)[3]
    assert np.array_equal(twice["image"], before["image"]) and np.array_equal(twice["target"], before["target"])
    assert not np.array_equal(after["image"], before["image"]) and after["name"] == before["name"]


@pytest.mark.parametrize("flip", FLIPS)
@pytest.mark.parametrize("follows", ["position", "content", "undecided"])
def test_flip_tells_position_from_content(runs, monkeypatch, flip, follows):
    """Early patches are worse by 10 points upright; turned, the gap is where it was, with the content, or nowhere."""
    early = torch.zeros(T, dtype=torch.double)
    early[:2] = 0.1
    goes_to = turned_patches((4, 4), flip)
    moved = torch.zeros_like(early)
    moved[goes_to] = early
    now = pair_of({"position": early, "content": moved, "undecided": torch.zeros_like(early)}[follows], seed=1)
    monkeypatch.setattr(flipped, "score_patches", lambda run, site, dataset: now[run.metrics["image_attention"]])
    for run in runs.values():
        monkeypatch.setitem(run.metrics, "grid", [4, 4])
    facts = flip_facts(runs, "layer_02", flip, pair_of(early), bootstrap_weights(N, 500).double())
    assert facts["follows"] == follows and facts["flip"] == flip
    if follows != "undecided":
        other = {"position": "content", "content": "position"}[follows]
        assert facts[follows]["gap"] > facts[other]["gap"] + 0.04
        assert facts["correlation"][follows] > 0.9 > facts["correlation"][other]
    assert facts["upright"]["gap"] > 0.04


def standardised_by_loop(counts, labels, share, patch: int) -> dict[str, float]:
    found = {}
    for mask, (right, valid) in counts.items():
        accuracy, mix = 0.0, 0.0
        for k in range(K):
            here = [n for n in range(N) if labels[n, patch] == k]
            if here:
                accuracy += share[k] * sum(right[n, patch] for n in here) / sum(valid[n, patch] for n in here)
                mix += share[k]
        found[mask] = float(accuracy / mix)
    return found


def test_standardised_equals_a_loop():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(-1, K, (N, T), generator=generator)
    labels[:, 5] = 1  # a patch at which two of the classes never occur
    valid = torch.randint(1, 100, (N, T), generator=generator).double()
    counts = {
        mask: PatchCounts((valid * torch.rand(N, T, generator=generator)).floor(), valid)
        for mask in ("causal", "bidirectional")
    }
    share = torch.tensor([0.6, 0.3, 0.1], dtype=torch.double)
    found = standardised(counts, labels, share, bootstrap_weights(N, 50).double())
    for patch in range(T):
        expected = standardised_by_loop(counts, labels, share, patch)
        for mask, value in expected.items():
            assert found[mask][patch] == pytest.approx(value)
        assert found["gap"][patch] == pytest.approx(expected["bidirectional"] - expected["causal"])


def test_standardised_sees_through_a_mask_that_is_merely_better_at_a_class():
    """Bidirectional is better at class 0 wherever that is; class 0 is mostly early. No position starves."""
    labels = torch.randint(1, K, (N, T), generator=torch.Generator().manual_seed(0))
    labels[: int(0.9 * N), :4] = 0
    labels[: int(0.1 * N), 4:] = 0
    counts = pair_of(0.2 * (labels == 0).double())
    weights, share = bootstrap_weights(N, 200).double(), torch.full((K,), 1 / K, dtype=torch.double)
    plain, fixed = gap_of(*accuracies(counts, weights)), standardised(counts, labels, share, weights)
    assert np.mean(plain["gap"][:4]) > np.mean(plain["gap"][4:]) + 0.1
    assert np.mean(fixed["gap"][:4]) == pytest.approx(np.mean(fixed["gap"][4:]), abs=0.01)


def test_command_writes_all_of_it(runs, tmp_path, capsys):
    argv = ["starvation", "--probes", *(str(runs[mask].path) for mask in ("causal", "bidirectional"))]
    main([*argv, "--site", "layer_01", "--by-class", "--flip", "--out", str(tmp_path)])
    facts = json.loads((tmp_path / "starvation.json").read_text())
    plain = starvation(runs["causal"], runs["bidirectional"], "layer_01")
    assert {key: facts[key] for key in plain} == plain and set(facts) - set(plain) == {"by_class", "flips"}
    assert [flip["flip"] for flip in facts["flips"]] == list(FLIPS)
    assert len(facts["flips"][2]["gap"]) == 4 and facts["flips"][2]["patches"] == [0, 1]
    assert sum(group["share"] for group in facts["by_class"]["groups"]) == pytest.approx(1)
    out = capsys.readouterr().out
    assert "the gap follows" in out and "first row, frequent classes" in out


def test_runs_in_the_wrong_order_are_an_error(runs):
    with pytest.raises(ValueError, match="ran under 'bidirectional'; expected the causal run there"):
        starvation(runs["bidirectional"], runs["causal"])
    with pytest.raises(ValueError, match="has no site 'layer_77'"):
        starvation(runs["causal"], runs["bidirectional"], "layer_77")
