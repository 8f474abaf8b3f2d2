"""Which classes are taken for which, and where in the stack they are told apart (Sec. 3.3)."""

from typing import Any

from probes.models.frozen_mllm import ADAPTER
from probes.results.probe_run import ProbeRun

LEAST_SHARE = 1e-3  # labels with a smaller share of the pixels are left out: their rates are of a few images
PAIRS = 30


def confusion_pairs(run: ProbeRun, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """The pairs of classes that are confused most at the adapter, and how that goes on.

    Returns:
        By falling confusion at the adapter, {"label", "predicted", "share": [S shares of the label's pixels that are
        predicted as the other class, by site], "half_gone": the first layer from which on at least half of the
        adapter's confusion is gone, or None}. Empty where the run did not count confusions or has no adapter.
    """
    if run.confusion is None or ADAPTER not in run.sites:
        return []
    pixels = run.confusion.double()
    labelled = pixels.sum(-1, keepdim=True)
    share = (pixels / labelled.clamp(min=1)).cpu()
    at_adapter = share[run.sites.index(ADAPTER)].clone()
    at_adapter.fill_diagonal_(0)
    rare = labelled[0, :, 0] < LEAST_SHARE * labelled[0].sum()
    at_adapter[rare] = 0
    classes, order = run.metrics["classes"], at_adapter.flatten().argsort(descending=True, stable=True)[:pairs]
    found = []
    for label, predicted in (divmod(i, len(classes)) for i in order.tolist()):
        if at_adapter[label, predicted] == 0:
            break
        by_site = dict(zip(run.sites, share[:, label, predicted].tolist(), strict=True))
        found.append(
            {
                "label": classes[label],
                "predicted": classes[predicted],
                "share": list(by_site.values()),
                "half_gone": half_gone([by_site[site] for site in run.layers], run.layers),
            }
        )
    return found


def half_gone(shares: list[float], layers: list[str]) -> str | None:
    """The first layer from which on a share stays at or below half of what it was at layers[0], the adapter.

    Example: 0.4, 0.1, 0.3, 0.2, 0.2 at the adapter and layers 1 to 4 give layer 3: at layer 2 it was back.
    """
    above = [i for i, share in enumerate(shares) if share > shares[0] / 2]
    return layers[above[-1] + 1] if above[-1] + 1 < len(layers) else None
