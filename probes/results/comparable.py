"""Check that runs can be compared: the same images, settings, layers and kind of probes."""

from llava_bidir.common.errors import UserError
from probes.models.sites import ADAPTER

from .finished_run import FinishedRun

KNOCKOUT_OPTIONS = ("classes", "layers", "block_by", "min_patches", "limit")  # of knockout.json


def check_pair(causal: FinishedRun, bidirectional: FinishedRun) -> None:
    """Raise a UserError unless these are a causal and a bidirectional run that can be compared image by image."""
    for run, mask in ((causal, "causal"), (bidirectional, "bidirectional")):
        if (own := run.mask) != mask:
            raise UserError(
                f"{run.path} has image attention {own!r}; --probes takes the causal run, then the other"
            )
    for key in ("dataset", "images", "grid", "untrained", "match", "draw"):
        ours = causal.metrics[key]
        theirs = bidirectional.metrics[key]
        if ours != theirs:
            raise UserError(
                f"{causal.path} and {bidirectional.path} differ in {key}: {ours!r} and {theirs!r}; compare runs on the "
                "same data, with the same weights replaced"
            )
    check_same_probes(causal, bidirectional)
    check_same_settings(causal, bidirectional)
    check_same_images(causal, bidirectional)


def check_same_images(first: FinishedRun, second: FinishedRun, advice: str = "") -> None:
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


def check_same_settings(first: FinishedRun, second: FinishedRun) -> None:
    """Raise a UserError unless both runs read their data with the same options, and the same text before the image."""
    runs = (first, second)
    settings = {
        "data.options": [run.manifest["data"]["options"] for run in runs],
        "model.prefix": [run.manifest["config"].get("prefix") for run in runs],
        "model.image_px": [run.manifest["config"].get("image_px") for run in runs],
    }
    for key, (ours, theirs) in settings.items():
        if ours != theirs:
            raise UserError(
                f"{first.path} and {second.path} cannot be compared: they differ in {key}, {ours!r} and {theirs!r}; "
                "make both with the same settings"
            )


def check_same_model(first: FinishedRun, second: FinishedRun) -> None:
    """Raise a UserError unless both runs, of one model and mask, were made from the same weights and config."""
    if first.manifest["identity"]["model"] != second.manifest["identity"]["model"]:
        raise UserError(
            f"{first.path} and {second.path} cannot be compared: they were made from other weights or another config; "
            "make the older one again"
        )


def knockout_difference(first: FinishedRun, second: FinishedRun) -> str | None:
    """Return what the knockouts of two runs differ in, and what to do; None if in nothing, or if a run has no knockout.

    Other classes, layers, sites or images are other effects.
    """
    found = [run.analysis("knockout.json") for run in (first, second)]
    if None in found:
        return None
    ours, theirs = ({key: x.get(key) for key in KNOCKOUT_OPTIONS} for x in found)
    for x in (ours, theirs):
        x["classes"] = sorted(entry["class"] for entry in x["classes"])
    for key in KNOCKOUT_OPTIONS:
        if ours[key] != theirs[key]:
            return (
                f"{first.path} and {second.path} have knockouts with other {key}: run `probes knockout` on both with "
                "the same options"
            )
    return None


def check_same_layers(first: FinishedRun, second: FinishedRun) -> None:
    """Raise a UserError if both runs have decoder layers, but not the same: the best of more layers is better."""
    ours = [site for site in first.layers if site != ADAPTER]
    theirs = [site for site in second.layers if site != ADAPTER]
    if ours and theirs and ours != theirs:
        raise UserError(
            f"{first.path} and {second.path} cannot be compared: the first has probes at {_some(ours)}, the "
            f"second at {_some(theirs)}, and the best of other layers would be another effect; make both with "
            "the same --model.sites"
        )


def check_same_probes(first: FinishedRun, second: FinishedRun) -> None:
    """Raise a UserError unless the probes of both runs were made in the same way, with the same settings."""
    if first.is_solved != second.is_solved:
        solved, trained = (first, second) if first.is_solved else (second, first)
        raise UserError(
            f"{solved.path} and {trained.path} cannot be compared: the probes of the first were solved, those of "
            "the second were trained; make both in the same way"
        )
    ours = first.metrics["probe"]
    theirs = second.metrics["probe"]
    for key in ("solved", *(key for key in theirs if key in ours)):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{first.path} and {second.path} cannot be compared: their probes differ in {key}, "
                f"{ours.get(key)!r} and {theirs.get(key)!r}; make both with the same settings"
            )


def _some(sites: list[str]) -> str:
    """Return how many sites there are, and the first and the last of them."""
    if len(sites) == 1:
        return sites[0]
    return f"{len(sites)} layers, {sites[0]} to {sites[-1]}"
