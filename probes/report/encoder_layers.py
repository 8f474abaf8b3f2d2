"""Which layer of a bare vision encoder reads best: the number of a sentence, and the table by class.

Shapes: S sites, N images, K classes, R resamplings.
"""

from probes.runs.formatting import (
    Entry,
    format_interval,
    format_points,
    format_score,
)
from probes.runs.probe_run import ProbeRun

from .verdicts import measured_effect


def best_layer(run: ProbeRun, claims: list[Entry]) -> Entry | None:
    """Return the best layer of an encoder, its mIoU, and the effect of the claim "over_last"; None without layers.

    The layer is the best one on the validation images. Its distance from the last one on the same images would be too
    large, because it was chosen there; the claim chooses layers on other images than those it scores.
    """
    best = run.peak_layer
    if best is None:
        return None
    effects = {claim["claim"]: measured_effect(claim) for claim in claims}
    over_last = effects.get(
        "over_last",
        {
            "value": None,
            "ci95": None,
        },
    )
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
