"""Check that runs can be compared: the same images, settings, layers and kind of probes, and other weights or seeds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_bidir.common.errors import UserError
from probes.models.sites import ADAPTER
from probes.runs.read import ProbeRun

KNOCKOUT_OPTIONS = ("classes", "layers", "block_by", "min_patches", "limit")  # of the analysis


SETTINGS = "make both with the same settings"


def _check_same(
    first: ProbeRun,
    second: ProbeRun,
    settings: Mapping[str, Sequence[Any]],
    advice: str,
    whose: str = "they",
) -> None:
    """Raise a UserError that ends with `advice` if a setting, by name with its value in both runs, differs."""
    for name, (ours, theirs) in settings.items():
        if ours != theirs:
            raise UserError(
                f"{first.path} and {second.path} cannot be compared: {whose} differ in {name}, {ours!r} and "
                f"{theirs!r}; {advice}"
            )


def check_same_images(first: ProbeRun, second: ProbeRun, advice: str = "") -> None:
    """Raise a UserError that ends with `advice` unless both runs have the same images, read in the same way."""
    if first.manifest["data"]["fingerprint"] != second.manifest["data"]["fingerprint"]:
        raise UserError(
            f"{first.path} and {second.path} were scored on different images or classes{advice}"
        )
    for key in ("image_resize", "dtype"):
        ours = first.metrics[key]
        theirs = second.metrics[key]
        if ours != theirs:
            raise UserError(
                f"{first.path} was scored with {key} {ours}, but {second.path} with {theirs}{advice}"
            )


def check_same_settings(first: ProbeRun, second: ProbeRun) -> None:
    """Raise a UserError unless both runs read their data with the same options, and the same text before the image."""
    runs = (first, second)
    settings = {"data.options": [run.manifest["data"]["options"] for run in runs]}
    for name in ("prefix", "image_px"):
        settings[f"model.{name}"] = [run.manifest["config"].get(name) for run in runs]
    _check_same(first, second, settings, SETTINGS)


def check_same_probes(first: ProbeRun, second: ProbeRun) -> None:
    """Raise a UserError unless the probes of both runs were made in the same way, with the same settings."""
    if first.is_solved != second.is_solved:
        solved, trained = (first, second) if first.is_solved else (second, first)
        raise UserError(
            f"{solved.path} and {trained.path} cannot be compared: the probes of the first were solved, those of "
            "the second were trained; make both in the same way"
        )
    ours = first.metrics["probe"]
    theirs = second.metrics["probe"]
    names = ("solved", *(name for name in theirs if name in ours))
    settings = {name: (ours.get(name), theirs.get(name)) for name in names}
    _check_same(first, second, settings, SETTINGS, "their probes")


def check_same_model(first: ProbeRun, second: ProbeRun) -> None:
    """Raise a UserError unless both runs, of one model and mask, were made from the same weights and config."""
    if first.manifest["identity"]["model"] != second.manifest["identity"]["model"]:
        raise UserError(
            f"{first.path} and {second.path} cannot be compared: they were made from other weights or another config; "
            "make the older one again"
        )


def _decoder_layers(run: ProbeRun) -> list[str]:
    return [site for site in run.layers if site != ADAPTER]


def check_same_layers(first: ProbeRun, second: ProbeRun) -> None:
    """Raise a UserError if both runs have decoder layers, but not the same: the best of more layers is better."""
    ours, theirs = map(_decoder_layers, (first, second))
    if ours and theirs and ours != theirs:
        both = [f"{len(x)} layers, {x[0]} to {x[-1]}" if x[1:] else x[0] for x in (ours, theirs)]
        raise UserError(
            f"{first.path} and {second.path} cannot be compared: the first has probes at {both[0]}, the second at "
            f"{both[1]}, and the best of other layers would be another effect; make both with the same --model.sites"
        )


def check_pair(causal: ProbeRun, bidirectional: ProbeRun) -> None:
    """Raise a UserError unless these are a causal and a bidirectional run that can be compared image by image."""
    for run, mask in ((causal, "causal"), (bidirectional, "bidirectional")):
        if run.mask != mask:
            raise UserError(
                f"{run.path} has image attention {run.mask!r}; --probes takes the causal run, then the other"
            )
    settings = {
        key: (causal.metrics[key], bidirectional.metrics[key])
        for key in ("dataset", "images", "grid", "untrained", "match", "draw")
    }
    advice = "compare runs on the same data, with the same weights replaced"
    _check_same(causal, bidirectional, settings, advice)
    check_same_probes(causal, bidirectional)
    check_same_settings(causal, bidirectional)
    check_same_images(causal, bidirectional)


def check_study(main: ProbeRun, runs: Sequence[ProbeRun]) -> None:
    """Raise a UserError unless the runs of a study can be compared with its main run, and draws with each other."""
    of_kind: dict[bool, ProbeRun] = {}
    of_mask: dict[str, ProbeRun] = {}
    for run in runs:
        check_same_probes(of_kind.setdefault(run.is_solved, run), run)
        check_same_settings(main, run)
        check_same_model(of_mask.setdefault(run.mask, run), run)
        if run.arm != "adapter":  # random adapters are compared at the adapter
            check_same_layers(main, run)
    for i, run in enumerate(runs):
        for other in runs[:i]:
            if run.is_solved == other.is_solved and run.mask == other.mask:
                _check_weights_differ(other, run)


def _check_weights_differ(first: ProbeRun, second: ProbeRun) -> None:
    """Raise if two draws of random weights are equal, or a draw equals the trained model: one number would be two."""
    arms = {first.arm, second.arm}
    if arms == {"trained"} or not (len(arms) == 1 or "trained" in arms):
        return
    sites = [ADAPTER] if "adapter" in arms else _decoder_layers(second)
    advice = "these weights are not two draws; make one of them again with another --model.draw"
    if "trained" in arms:
        advice = "random weights have changed nothing; make the control again"
    _check_differ(first, second, sites, advice)


def check_seeds_differ(runs: Sequence[ProbeRun]) -> None:
    """Raise if the runs of two seeds under a mask are equal: the mean over seeds would count one training twice."""
    advice = "these are not two trainings; pass one, or train the other with a seed of its own"
    for i, run in enumerate(runs):
        for other in runs[:i]:
            if run.is_solved == other.is_solved and run.layers:
                _check_differ(other, run, run.sites, advice)


def _check_differ(
    first: ProbeRun,
    second: ProbeRun,
    sites: Iterable[str],
    advice: str,
) -> None:
    """Raise a UserError if the probes of two runs are the same at these sites, where their weights should differ."""
    shared = [site for site in sites if site in first.content and site in second.content]
    if shared and all(first.content[site] == second.content[site] for site in shared):
        raise UserError(
            f"{first.path} and {second.path} have the same probes at {', '.join(shared[:3])}: {advice}"
        )


def knockout_difference(first: ProbeRun, second: ProbeRun) -> str | None:
    """Return what the knockouts of two runs differ in, and what to do; None if in nothing, or if a run has no knockout.

    Other classes, layers, sites or images are other effects.
    """
    found = [run.analysis("knockout.json") for run in (first, second)]
    if None in found:
        return None
    ours, theirs = (x["options"] | {"classes": sorted(x["options"]["classes"])} for x in found)
    for key in KNOCKOUT_OPTIONS:
        if ours[key] != theirs[key]:
            return (
                f"{first.path} and {second.path} have knockouts with other {key}: run `probes knockout` on both with "
                "the same options"
            )
    return None
