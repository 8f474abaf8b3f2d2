"""Find the most confused pairs of classes and the layer that resolves each (Sec. 3.3)."""

from typing import Any

from probes.models.sites import ADAPTER
from probes.results.probe_run import ProbeRun

LEAST_SHARE = 1e-3  # labels with a smaller share of all pixels are skipped: their rates rest on a few images
PAIRS = 30


def most_confused_pairs(run: ProbeRun, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """Return the pairs of classes that are confused most at the adapter, with their confusion at every site.

    Returns:
        Pairs sorted by descending confusion at the adapter: {"label", "predicted", "share", "half_gone"}. "share"
        lists, per site, the share of the label's pixels predicted as the other class. "half_gone" is defined by
        :func:`first_halved_layer`. Empty if the run has no adapter site or counted no confusions.
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
    layers, entries = [run.sites.index(site) for site in run.layers], []
    for label, predicted in (divmod(i, len(classes)) for i in order.tolist()):
        if at_adapter[label, predicted] > 0:
            shares = share[:, label, predicted].tolist()
            half_gone = first_halved_layer([shares[i] for i in layers], run.layers)
            pair = {"label": classes[label], "predicted": classes[predicted]}
            entries.append(pair | {"share": shares, "half_gone": half_gone})
    return entries


def first_halved_layer(shares: list[float], layers: list[str]) -> str | None:
    """Return the first layer from which the share stays at or below half of shares[0]; None if there is none.

    Example: shares 0.4, 0.1, 0.3, 0.2, 0.2 at the adapter and layers 1 to 4 give layer 3, since layer 2 is above half.
    """
    above = [i for i, share in enumerate(shares) if share > shares[0] / 2]
    return layers[above[-1] + 1] if above[-1] + 1 < len(layers) else None
