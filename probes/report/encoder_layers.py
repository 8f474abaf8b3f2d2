"""Which layer of a bare vision encoder reads best: the number of a sentence, and the table by class.

Shapes: S sites, N images, K classes, R resamplings.
"""

from probes.models.sites import FINAL_NORM, is_layer
from probes.runs.formatting import (
    Entry,
    format_interval,
    format_percent,
    format_points,
    format_score,
)
from probes.runs.probe_run import ProbeRun

from .verdicts import measured_effect

SHOWN_LAYERS = 7  # in the table by class


def best_layer(run: ProbeRun, claims: list[Entry]) -> Entry | None:
    """Return the best layer of an encoder, its mIoU, and the effect of the claim "over_last"; None without layers.

    The layer is the best one on the validation images. Its distance from the last one on the same images would be too
    large, because it was chosen there; the claim chooses layers on other images than those it scores.
    """
    best = run.peak_layer
    if best is None:
        return None
    effects = {claim["claim"]: measured_effect(claim) for claim in claims}
    over_last = effects.get("over_last", {"value": None, "ci95": None})
    entry = run.metrics["sites"][run.sites.index(best)]
    return {
        "site": best,
        "last": run.last_layer,
        "miou": entry["miou"],
        "ci95": entry["miou_ci95"],
        "over_last": over_last["value"],
        "over_last_ci95": over_last["ci95"],
    }


def describe_best_layer(best: Entry) -> str:
    """Return "layer 8 of 12 reads best: 53.7 [..] mIoU", and the claim's difference of the best layer and the last."""
    layer = int(best["site"].removeprefix("layer_"))
    last = int(best["last"].removeprefix("layer_"))
    text = f"layer {layer} of {last} reads best: {format_score(best['miou'], best['ci95'])} mIoU"
    if layer == last:
        return f"{text}; it is the last one"
    if best["over_last_ci95"] is None:
        return f"{text}; the last one was not probed"
    over_last = f"{format_points(best['over_last'])} {format_interval(best['over_last_ci95'])}"
    return f"{text}; best minus last layer, as the verdict counts it: {over_last} points"


def class_table(run: ProbeRun) -> list[dict[str, str]]:
    """Return the IoU of each class in percent at some layers, the best one of them, and at the final norm."""
    layers = [entry for entry in run.metrics["sites"] if is_layer(entry["site"])]
    best = next(entry for entry in layers if entry["site"] == run.peak_layer)
    steps = max(1, len(layers) - 1)
    evenly = {round(i * steps / (SHOWN_LAYERS - 1)) for i in range(SHOWN_LAYERS)}
    shown = [entry for i, entry in enumerate(layers) if i in evenly or entry is best]
    shown += [entry for entry in run.metrics["sites"] if entry["site"] == FINAL_NORM]
    rows = [{"class": "mean (mIoU)"} | {_title(x, best): format_percent(x["miou"]) for x in shown}]
    for k, name in enumerate(run.metrics["classes"]):
        values = {_title(x, best): x["iou_per_class"][k] for x in shown}
        rows.append({"class": name} | {key: format_percent(value) for key, value in values.items()})
    return rows


def _title(entry: Entry, best: Entry) -> str:
    title = entry["site"].replace("_", " ")
    return f"{title} (best)" if entry is best else title
