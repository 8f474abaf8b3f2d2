"""Accuracy by patch: with the classes held fixed, on flipped images, with own probes, and with dummy tokens."""

import json
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from probes.analyses.starvation.by_position import SHRINKAGES, STRENGTHS, count_positions, cross_validate, sum_moments
from probes.analyses.starvation.dummy_tokens import add_dummy_tokens

from llava_bidir.common.bootstrap import bootstrap_weights, interval
from llava_bidir.common.errors import UserError
from probes.analyses.starvation import by_position, flipped
from probes.analyses.starvation.by_class import standardised_gap
from probes.analyses.starvation.flipped import FLIP_AXES, FlippedDataset, flip_results, flipped_positions
from probes.analyses.starvation.patch_accuracy import (
    PatchCounts,
    accuracy_gap,
    count_run_patches,
    first_gaps,
    patch_accuracy,
)
from probes.analyses.starvation.run import gap_estimates, starvation
from probes.cli import main
from probes.data.batches import MaskPreparer
from probes.models.frozen_mllm import FrozenMLLM
from probes.ops.geometry import Geometry
from probes.results.probe_run import ProbeRun

N, T, K = 80, 16, 3


def random_counts(gap: torch.Tensor, seed: int = 0) -> dict[str, PatchCounts]:
    """Counts of 100 pixels per patch in which bidirectional is better by `gap`, f[T] or f[N, T]."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.full((N, T), 100.0, dtype=torch.double)
    noise = lambda: torch.randn(N, T, generator=generator, dtype=torch.double)
    return {"causal": PatchCounts(50 + noise(), valid), "bidirectional": PatchCounts(50 + 100 * gap + noise(), valid)}


def test_frozen_probe_on_upright_images_equals_the_counts_of_the_run(runs):
    run = runs["causal"]
    for site in ("encoder", "layer_02", "final_norm"):
        counts = count_run_patches(run, run.mllm(), site, run.dataset(), "upright", batch_size=4)
        assert torch.equal(counts.right, run.counts.patch_right[run.sites.index(site)].double())
        assert torch.equal(counts.valid, run.counts.patch_valid.double())


@pytest.mark.parametrize("flip", FLIP_AXES)
def test_flipped_patches_are_at_their_flipped_positions(runs, flip):
    upright, positions = runs["causal"].dataset(), flipped_positions((2, 2), flip)
    once, before = FlippedDataset(upright, flip), upright[3]
    cells = lambda mask: [half for part in np.array_split(mask, 2) for half in np.array_split(part, 2, axis=1)]
    after = cells(once[3]["target"])
    for patch, pixels in enumerate(cells(before["target"])):
        assert np.array_equal(np.sort(pixels.ravel()), np.sort(after[positions[patch]].ravel()))
    twice = FlippedDataset(once, flip)[3]
    assert np.array_equal(twice["image"], before["image"]) and np.array_equal(twice["target"], before["target"])
    assert not np.array_equal(once[3]["image"], before["image"]) and once[3]["name"] == before["name"]


def flip_with_gaps(runs, monkeypatch, flip: str, upright: torch.Tensor, transformed: torch.Tensor) -> dict:
    """Results of a flip if the masks differ by these accuracies, by patch."""
    counts = random_counts(transformed, seed=1)
    count = lambda run, *more: counts[run.metrics["image_attention"]]
    monkeypatch.setattr(flipped, "count_run_patches", count)
    for run in runs.values():
        monkeypatch.setitem(run.metrics, "grid", [4, 4])
    return flip_results(runs, "layer_02", flip, random_counts(upright), bootstrap_weights(N, 500).double())


@pytest.mark.parametrize("flip", FLIP_AXES)
@pytest.mark.parametrize("follows", ["position", "content", "undecided"])
def test_flip_separates_position_from_content(runs, monkeypatch, flip, follows):
    """Upright, early patches have a gap of 10 points. Flipped, it stays, moves with the content, or vanishes."""
    early = torch.zeros(T, dtype=torch.double)
    early[:2] = 0.1
    moved = torch.zeros_like(early)
    moved[flipped_positions((4, 4), flip)] = early
    gap = {"position": early, "content": moved, "undecided": torch.zeros_like(early)}[follows]
    result = flip_with_gaps(runs, monkeypatch, flip, upright=early, transformed=gap)
    assert result["follows"] == follows and result["flip"] == flip and result["upright"]["gap"] > 0.04
    if follows != "undecided":
        other = {"position": "content", "content": "position"}[follows]
        assert result[follows]["gap"] > result[other]["gap"] + 0.04
        assert result["correlation"][follows] > 0.9 > result["correlation"][other]


def test_flip_without_a_gap_upright_follows_nothing(runs, monkeypatch):
    """A gap that only transformed images have tells nothing about the one that is looked for."""
    early = torch.zeros(T, dtype=torch.double)
    early[:4] = 0.1
    result = flip_with_gaps(runs, monkeypatch, "rotate", upright=-early, transformed=early)
    assert result["moved_ci95"][0] > 0 and result["follows"] == "no gap"


def standardised_by_loop(counts, labels, share, patch: int) -> dict[str, float]:
    expected = {}
    for mask, (right, valid) in counts.items():
        accuracy, mix = 0.0, 0.0
        for k in range(K):
            images = [n for n in range(N) if labels[n, patch] == k]
            if images:
                accuracy += share[k] * sum(right[n, patch] for n in images) / sum(valid[n, patch] for n in images)
                mix += share[k]
        expected[mask] = float(accuracy / mix)
    return expected


def test_standardised_gap_equals_a_loop():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(-1, K, (N, T), generator=generator)
    labels[:, 5] = 1  # two of the classes never occur at this patch
    valid = torch.randint(1, 100, (N, T), generator=generator).double()
    right = lambda: (valid * torch.rand(N, T, generator=generator)).floor()
    counts = {mask: PatchCounts(right(), valid) for mask in ("causal", "bidirectional")}
    share = torch.tensor([0.6, 0.3, 0.1], dtype=torch.double)
    result = standardised_gap(counts, labels, share, bootstrap_weights(N, 50).double())
    for patch in range(T):
        expected = standardised_by_loop(counts, labels, share, patch)
        expected["gap"] = expected["bidirectional"] - expected["causal"]
        assert {key: result[key][patch] for key in expected} == pytest.approx(expected)


def test_standardisation_removes_a_gap_that_is_due_to_one_class():
    """Bidirectional is better at class 0 everywhere, and class 0 is mostly early."""
    labels = torch.randint(1, K, (N, T), generator=torch.Generator().manual_seed(0))
    labels[: int(0.9 * N), :4] = 0
    labels[: int(0.1 * N), 4:] = 0
    counts = random_counts(0.2 * (labels == 0).double())
    weights, share = bootstrap_weights(N, 200).double(), torch.full((K,), 1 / K, dtype=torch.double)
    plain, fixed = accuracy_gap(*patch_accuracy(counts, weights)), standardised_gap(counts, labels, share, weights)
    assert np.mean(plain["gap"][:4]) > np.mean(plain["gap"][4:]) + 0.1
    assert np.mean(fixed["gap"][:4]) == pytest.approx(np.mean(fixed["gap"][4:]), abs=0.01)


def check_own_probe(results: dict, out: str) -> None:
    layer, adapter = results["by_position"]["sites"]
    assert (layer["site"], adapter["site"], results["by_position"]["positions"]) == ("layer_01", "adapter", 4)
    for entry in (layer, adapter):
        for a, b, c in zip(*(entry[name]["gap"] for name in ("shared", "own", "read_out")), strict=True):
            assert c == pytest.approx(a - b)
        for mask in ("causal", "bidirectional"):
            loss = {name: entry["chosen"][mask][name]["cv_cross_entropy"] for name in ("shared", "own")}
            assert loss["own"] <= loss["shared"] and entry["chosen"][mask]["shared"]["shrinkage"] == 1
    row = layer["own"]["first_row"]
    assert f"layer_01, a probe for each position, first row: causal {row['causal']:.1%}" in out


def check_dummy_tokens(results: dict, out: str) -> None:
    dummy = results["dummy_tokens"]
    assert dummy["tokens"] == 2 and set(dummy["change"]) == {"causal", "bidirectional"}
    for mask, change in dummy["change"].items():
        assert change["patch_0"]["value"] == pytest.approx(dummy[mask][0] - results[mask][0])
        assert change["first_row"]["value"] == pytest.approx(dummy["first_row"][mask] - results["first_row"][mask])
        low, high = change["patch_0"]["ci95"]
        own = dummy["by_position"]["sites"]
        assert [entry["site"] for entry in own] == ["layer_01"]
        chosen = lambda entry: entry["chosen"]["causal"]["shared"]["cv_cross_entropy"]
        assert chosen(own[0]) != chosen(results["by_position"]["sites"][0]), "other states"
        assert low <= high and f"2 dummy tokens before the image, {mask}: patch 0" in out


def test_first_gaps_are_of_patch_0_and_of_the_first_row():
    counts = random_counts(torch.linspace(0.3, 0.0, T, dtype=torch.double))
    estimates = first_gaps(counts, bootstrap_weights(N, 200).double(), columns=4)
    assert estimates["starvation"][0] == pytest.approx(0.3, abs=0.01)
    assert estimates["starvation_first_row"][0] == pytest.approx(0.27, abs=0.01)
    for value, resampled in estimates.values():
        assert resampled.shape == (200,) and resampled.mean().item() == pytest.approx(value, abs=0.005)


def test_estimates_are_those_of_the_results(runs):
    results = starvation(runs["causal"], runs["bidirectional"], "layer_01", seed=3)
    estimates = gap_estimates(runs["causal"], runs["bidirectional"], "layer_01", seed=3)
    row = results["first_row"]
    for name, value, ci95 in (
        ("starvation", results["gap"][0], results["gap_ci95"][0]),
        ("starvation_first_row", row["gap"], row["gap_ci95"]),
    ):
        assert estimates[name][0] == pytest.approx(value) and interval(*estimates[name]) == pytest.approx(ci95)


# ------------------------------------------------------------------------------------------------- probes by position
GRID = SimpleNamespace(grid=(2, 3), geometry=Geometry((2, 3), 24, 24), device=torch.device("cpu"))


def simulated_batches(moved: bool, images: int = 80, seed: int = 0) -> list:
    """Batches of two folds; a token of class k has the mean of class k, or `moved`, of another one at each position."""
    generator, tokens = torch.Generator().manual_seed(seed), 6
    classes = torch.randint(K, (images, tokens), generator=generator)
    means = 4 * torch.eye(K, 5)[(classes + torch.arange(tokens) * moved) % K]
    states = means + torch.randn(images, tokens, 5, generator=generator)
    masks = classes.view(images, 2, 3).repeat_interleave(8, 1).repeat_interleave(8, 2).to(torch.uint8)
    masks[::3, :3] = 255
    folds = torch.arange(images) * 2 // images
    parts = [range(start, start + 10) for start in range(0, images, 10)]
    return [(int(folds[part[0]]), {"adapter": states[list(part)]}, masks[list(part)]) for part in parts]


def prepared(batches: list) -> Iterator:
    """Yield the batches with masks as the data set prepares them."""
    prepare = MaskPreparer(GRID.geometry, K, 5)
    return ((fold, states, prepare(masks)) for fold, states, masks in batches)


def simulated_moments(batches: list, monkeypatch, positions: int = 6) -> dict:
    monkeypatch.setattr(by_position, "FOLDS", 2)
    return sum_moments(prepared(batches), GRID, positions, K)


def test_cross_validated_losses_equal_interpolated_logits(monkeypatch):
    batches = simulated_batches(moved=True)
    moments = simulated_moments(batches, monkeypatch)
    losses, pixels = cross_validate(prepared(batches), GRID, moments)
    total, valid = 0.0, 0
    for fold, states, masks in batches:
        logits = moments["adapter"].solve([STRENGTHS[3]], SHRINKAGES[1], without=fold)(states["adapter"])[0]
        up = F.interpolate(logits.transpose(1, 2).unflatten(2, (2, 3)), (16, 24), mode="bilinear")
        total += F.cross_entropy(up, masks.long(), ignore_index=255, reduction="sum").item()
        valid += (masks != 255).sum().item()
    assert losses["adapter"][1, 3].item() == pytest.approx(total, rel=1e-4) and pixels == valid


def test_cross_validation_shares_the_probe_where_positions_do_not_differ(monkeypatch):
    chosen = {}
    for moved in (False, True):
        batches = simulated_batches(moved)
        losses = cross_validate(prepared(batches), GRID, simulated_moments(batches, monkeypatch))[0]["adapter"]
        chosen[moved] = SHRINKAGES[int(losses.min(1).values.argmin())]
    assert chosen[False] == 1 and chosen[True] <= 0.3


def test_positions_with_own_probes_follow_the_memory(monkeypatch):
    mllm = SimpleNamespace(grid=(24, 24), device=torch.device("cpu"), widths={"layer_16": 4096})
    row = 8 * by_position.FOLDS * 24 * 4096 * (4096 + 150)
    for rows, expected in ((2, 48), (5.5, 120), (30, 576)):
        monkeypatch.setattr(by_position, "available_memory", lambda rows=rows: int(2 * rows * row) + 2)
        assert count_positions(mllm, ["layer_16"], 150) == expected
    monkeypatch.setattr(by_position, "available_memory", lambda: 3 * row)
    with pytest.raises(UserError, match=r"needs 26\.7 GB for probes of the first two rows at layer_16"):
        count_positions(mllm, ["layer_16"], 150)


# -------------------------------------------------------------------------------------------------------- dummy tokens
def test_dummy_tokens_repeat_the_last_token_before_the_image(runs):
    mllm = runs["causal"].mllm()
    before, pixels = mllm.prefix_ids[0].tolist(), mllm.preprocess([runs["causal"].dataset()[0]["image"]])
    add_dummy_tokens(mllm, 3, pixels)
    image = mllm.model.config.image_token_id
    assert mllm.ids[0].tolist() == before + before[-1:] * 3 + [image] * 4


@pytest.mark.parametrize("bug", ["ids", "states"])
def test_dummy_tokens_that_do_not_reach_the_model_are_an_error(runs, monkeypatch, bug):
    mllm = runs["causal"].mllm()
    pixels = mllm.preprocess([runs["causal"].dataset()[0]["image"]])
    states = mllm.states(pixels)
    if bug == "ids":
        monkeypatch.setattr(FrozenMLLM, "set_prefix", lambda self, ids: None)
    else:
        monkeypatch.setattr(FrozenMLLM, "states", lambda self, *args: states)
    with pytest.raises(UserError, match="2 dummy tokens were inserted, but the image starts at token"):
        add_dummy_tokens(mllm, 2, pixels)


def test_dummy_tokens_need_a_prompt_and_a_number(runs):
    mllm = runs["causal"].mllm()
    pixels = mllm.preprocess([runs["causal"].dataset()[0]["image"]])
    mllm.set_prefix([])
    with pytest.raises(UserError, match="repeats the last token before the image, but this model has none"):
        add_dummy_tokens(mllm, 2, pixels)
    with pytest.raises(UserError, match="at least 1, got -1"):
        starvation(runs["causal"], runs["bidirectional"], "layer_01", dummy_tokens=-1)


def test_command_writes_every_part(runs, tmp_path, capsys):
    argv = ["starvation", "--probes", *(str(runs[mask].path) for mask in ("causal", "bidirectional"))]
    further = ["--by-class", "--flip", "--own-probe", "--dummy-tokens", "2"]
    main([*argv, "--site", "layer_01", *further, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "starvation.json").read_text())
    plain = starvation(runs["causal"], runs["bidirectional"], "layer_01")
    options = results.pop("options")
    assert options == plain.pop("options") | {
        **{"by_class": True, "flips": list(FLIP_AXES)},
        **{"own_probe": True, "dummy_tokens": 2},
    }
    assert {key: results[key] for key in plain} == plain
    assert set(results) - set(plain) == {"by_class", "flips", "by_position", "dummy_tokens"}
    assert [flip["flip"] for flip in results["flips"]] == list(FLIP_AXES)
    assert len(results["flips"][2]["gap"]) == 4 and results["flips"][2]["patches"] == [0, 1]
    assert sum(group["share"] for group in results["by_class"]["groups"]) == pytest.approx(1)
    out = capsys.readouterr().out
    assert "; position or content: " in out and "first row, frequent classes" in out
    check_own_probe(results, out)
    check_dummy_tokens(results, out)
    accuracy = [results[mask][0] for mask in ("causal", "bidirectional")]
    assert f"patch 0: causal {accuracy[0]:.1%}, bidirectional {accuracy[1]:.1%}, difference" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe": {"feature_norm": "layernorm"}}, "their probes differ in feature_norm, .* and 'layernorm'"),
        ({"probe": {"solved": "optimum"}}, "their probes differ in solved, None and 'optimum'"),
        ({"match": "update"}, "differ in match: 'none' and 'update'"),
        ({"draw": 1}, "differ in draw: 0 and 1"),
    ],
)
def test_runs_of_other_probes_or_controls_are_not_compared(runs, change, message):
    other = ProbeRun(runs["bidirectional"].path)
    probe = other.metrics["probe"] | change.get("probe", {})
    other.metrics = {**other.metrics, **change, "probe": probe}
    with pytest.raises(UserError, match=message):
        starvation(runs["causal"], other, "layer_01")


def test_without_layers_the_site_must_be_named(runs, monkeypatch):
    monkeypatch.setattr(ProbeRun, "peak_layer", None)
    with pytest.raises(UserError, match="has no decoder layer, and so no best one; choose a site by --site"):
        starvation(runs["causal"], runs["bidirectional"])
    assert starvation(runs["causal"], runs["bidirectional"], "adapter")["site"] == "adapter"


def test_wrong_runs_and_sites_are_errors(runs):
    with pytest.raises(ValueError, match="has image attention 'bidirectional'; --probes takes the causal run, then"):
        starvation(runs["bidirectional"], runs["causal"])
    with pytest.raises(ValueError, match="has no site 'layer_77'"):
        starvation(runs["causal"], runs["bidirectional"], "layer_77")
