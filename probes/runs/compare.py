"""Check that runs can be compared: the same images, settings, layers and kind of probes, and other weights or seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from llava_bidir.common.errors import UserError
from probes.models.sites import ADAPTER, every_nth
from probes.runs.read import ProbeRun

KNOCKOUT_OPTIONS = ("classes", "layers", "block_by", "min_patches", "limit")  # of the analysis


def _check_same(
    first: ProbeRun,
    second: ProbeRun,
    read: Callable[[ProbeRun], Mapping[str, object]],
    advice: str = "make both with the same settings",
) -> None:
    """Raise a UserError that ends with `advice` if a setting, which `read` returns by name, differs."""
    ours = read(first)
    theirs = read(second)
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{first.path} and {second.path} cannot be compared: they differ in {name}, {ours.get(name)!r} and "
                f"{theirs.get(name)!r}; {advice}"
            )


def check_same_images(
    first: ProbeRun,
    second: ProbeRun,
    advice: str = "score both on the same data",
    settings: Sequence[str] = ("image_resize", "dtype"),
) -> None:
    """Raise a UserError that ends with `advice` unless both runs have the same images, and these settings."""

    def read(run: ProbeRun) -> dict[str, Any]:
        of_metrics = {name: run.metrics[name] for name in settings}
        return {"images or classes": run.manifest["data"]["fingerprint"], **of_metrics}

    _check_same(first, second=second, read=read, advice=advice)


def check_one_lab(first: ProbeRun, second: ProbeRun) -> None:
    """Raise a UserError unless a lab can show two runs side by side."""
    advice = "open them in two labs"
    check_same_images(first, second, advice)

    def read(run: ProbeRun) -> dict[str, list[str] | list[int]]:
        return {"sites": run.sites, "grid": run.metrics["grid"]}

    _check_same(first, second=second, read=read, advice=advice)


def _settings(run: ProbeRun) -> dict[str, Any]:
    """Return the options that data were read with, and the text before the image."""
    config = run.manifest["config"]
    return {
        "data.options": run.manifest["data"]["options"],
        "model.prefix": config.get("prefix"),
        "model.image_px": config.get("image_px"),
    }


def check_same_probes(first: ProbeRun, second: ProbeRun) -> None:
    """Raise a UserError unless the probes of both runs, whose heads may differ, were made in the same way."""

    def read(run: ProbeRun) -> dict[str, Any]:
        return {"probes": run.probe_kind, **run.metrics["probe"], "head": None}

    _check_same(first, second=second, read=read)


def _decoder_layers(run: ProbeRun) -> list[str]:
    return [site for site in run.layers if site != ADAPTER]


def check_pair(first: ProbeRun, second: ProbeRun) -> None:
    """Raise a UserError unless two runs of a study, which has checked all else, can be compared patch by patch."""
    keys = ("grid", "untrained", "match", "draw")
    _check_same(first, second, lambda run: {key: run.metrics[key] for key in keys})


def check_study(main: ProbeRun, runs: Sequence[ProbeRun]) -> None:
    """Raise a UserError unless the runs of a study can be compared with its main run, and draws with each other."""
    of_kind: dict[bool, ProbeRun] = {}
    of_mask: dict[str, ProbeRun] = {}
    for run in runs:
        check_same_probes(of_kind.setdefault(run.is_solved, run), run)
        _check_same(main, run, _settings)
        _check_same(
            of_mask.setdefault(run.mask, run),
            second=run,
            read=lambda run: run.manifest["identity"]["model"],
            advice="make the older one again",
        )
        # random adapters are compared at the adapter
        is_compared = run.arm != "adapter" and _decoder_layers(main) and _decoder_layers(run)
        if is_compared and not _is_thinned(run, main):
            _check_same(
                main,
                second=run,
                read=lambda run: {"layers": _decoder_layers(run)},
                advice="the best of more layers is better; make both with the same --model.sites",
            )
    for first, second in combinations(runs, 2):
        if first.is_solved == second.is_solved and first.mask == second.mask:
            _check_weights_differ(first, second)


def _is_thinned(run: ProbeRun, main: ProbeRun) -> bool:
    """Return whether a random model has every Nth layer of the main run: chosen by depth, not by what is read there."""
    spaced = [every_nth(main.layers, step) for step in range(2, len(main.layers) + 1)]
    return run.metrics["match"] != "none" and run.layers in spaced


def _check_weights_differ(first: ProbeRun, second: ProbeRun) -> None:
    """Raise if two draws of random weights are equal, or a draw equals the trained model: one number would be two."""
    arms = {first.arm, second.arm}
    sites = [ADAPTER] if "adapter" in arms else _decoder_layers(second)
    if "trained" in arms:
        advice = "random weights have changed nothing; make the control again"
        _check_differ(first, second=second, sites=sites, advice=advice)
    elif len(arms) == 1:
        advice = "these are not two draws; make one of them again with another --model.draw"
        _check_differ(first, second=second, sites=sites, advice=advice)


def check_seeds_differ(runs: Sequence[ProbeRun]) -> None:
    """Raise if the runs of two seeds under a mask are equal: the mean over seeds would count one training twice."""
    advice = "these are not two trainings; pass one, or train the other with a seed of its own"
    for first, second in combinations(runs, 2):
        if first.is_solved == second.is_solved and second.layers:
            _check_differ(first, second=second, sites=second.sites, advice=advice)


def _check_differ(first: ProbeRun, second: ProbeRun, sites: Iterable[str], advice: str) -> None:
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
    knockouts = [run.analysis("knockout.json") for run in (first, second)]
    if None in knockouts:
        return None
    options = [knockout["options"] for knockout in knockouts]
    ours, theirs = (made_with | {"classes": sorted(made_with["classes"])} for made_with in options)
    for key in KNOCKOUT_OPTIONS:
        if ours[key] != theirs[key]:
            return (
                f"{first.path} and {second.path} have knockouts with other {key}: run `probes knockout` on both with "
                "the same options"
            )
    return None
