"""Which layer of a bare vision encoder reads best: the number of a sentence, and the table by class.

Shapes: S sites, N images, K classes, R resamplings.
"""

from typing import Any

from probes.models.sites import FINAL_NORM, is_layer
from probes.results.formatting import format_interval, format_percent, format_score
from probes.results.probe_run import ProbeRun

SHOWN_LAYERS = 7  # in the table by class


def best_layer(run: ProbeRun) -> dict[str, Any] | None:
    """Return the best layer of an encoder, its mIoU, and how far it is above the last layer; None without layers.

    The layer is the best one on the validation images; the claim "over_last" chooses it on other images than it
    scores.
    """
    best = run.peak_layer
    if best is None:
        return None
    scores = run.site_scores()
    last = scores.get(run.last_layer)
    over_last = scores[best] - last if last else None
    entry = run.metrics["sites"][run.sites.index(best)]
    return {
        "site": best,
        "last": run.last_layer,
        "miou": entry["miou"],
        "ci95": entry["miou_ci95"],
        "over_last": None if over_last is None else over_last.value,
        "over_last_ci95": None if over_last is None else over_last.ci95,
    }


def describe_best_layer(best: dict[str, Any]) -> str:
    """Return "layer 8 of 12 reads best: 53.7 [..] mIoU, 1.6 points above the last"."""
    layer = int(best["site"].removeprefix("layer_"))
    last = int(best["last"].removeprefix("layer_"))
    text = f"layer {layer} of {last} reads best: {format_score(best['miou'], best['ci95'])} mIoU"
    if layer == last:
        return f"{text}; it is the last one"
    if best["over_last"] is None:
        return f"{text}; the last one was not probed"
    above = f"{100 * best['over_last']:.1f} points above the last {format_interval(best['over_last_ci95'])}"
    return f"{text}, {above}"


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


def _title(entry: dict[str, Any], best: dict[str, Any]) -> str:
    title = entry["site"].replace("_", " ")
    return f"{title} (best)" if entry is best else title
