"""`probes starvation`: are early patches worse off under causal attention? (Sec. 5.1, Fig. 7, Table 3)

Image tokens come in raster order, so that under a causal mask patch 0 sees no other patch and the last one sees all.
Compared is the pixel accuracy under each patch at one site of two runs on the same images. The difference cancels what
position and content share: early patches are mostly sky and ceiling under both masks.

Shapes: N images, T patches, R resamplings.
"""

import argparse
from pathlib import Path

from torch import Tensor

from ..results import ProbeRun, peak_layer, write_json
from ..statistics import bootstrap_weights, interval


def starvation(causal: ProbeRun, bidirectional: ProbeRun, site: str | None = None, seed: int = 0) -> dict:
    """What starvation.json holds: accuracy by patch of both runs, and the gap with paired intervals over images.

    Args:
        causal, bidirectional: Runs on the same validation images.
        site: Where both are compared; None takes the causal run's best decoder layer.
        seed: Of the bootstrap.

    Raises:
        ValueError: The runs do not belong together, or a run has no such site.
    """
    _check_pair(causal, bidirectional)
    site = site or peak_layer({entry["site"]: entry["miou"] for entry in causal.metrics["sites"]})
    counts = {run.metrics["image_attention"]: _patch_counts(run, site) for run in (causal, bidirectional)}
    weights = bootstrap_weights(causal.metrics["images"], seed=seed, groups=causal.groups).double()
    patches = _compare(counts, weights)
    columns = causal.metrics["grid"][1]
    row = _compare(
        {k: (r[:, :columns].sum(1, True), v[:, :columns].sum(1, True)) for k, (r, v) in counts.items()}, weights
    )
    return {
        "site": site,
        "grid": causal.metrics["grid"],
        "images": causal.metrics["images"],
        "untrained": causal.metrics["untrained"],
        **patches,
        "first_row": {k: v[0] for k, v in row.items()},
    }


def _compare(counts: dict[str, tuple[Tensor, Tensor]], weights: Tensor) -> dict[str, list]:
    """Accuracy of both masks by column of their counts, and the gap with its interval.

    Args:
        counts: (right, valid) pixels f[N, T] by mask.
        weights: f[R, N].
    """
    accuracy = {mask: right.sum(0) / valid.sum(0) for mask, (right, valid) in counts.items()}
    drawn = {mask: (weights @ right) / (weights @ valid) for mask, (right, valid) in counts.items()}
    gap, drawn_gap = (x["bidirectional"] - x["causal"] for x in (accuracy, drawn))
    return {
        **{mask: values.tolist() for mask, values in accuracy.items()},
        "gap": gap.tolist(),
        "gap_ci95": [interval(g, drawn_gap[:, i]) for i, g in enumerate(gap.tolist())],
    }


def _patch_counts(run: ProbeRun, site: str) -> tuple[Tensor, Tensor]:
    """Rightly predicted and labelled pixels by image and patch, f[N, T] each."""
    if site not in run.sites:
        raise ValueError(f"{run.path} has no site {site!r}; it has {', '.join(run.sites)}")
    return run.counts.patch_right[run.sites.index(site)].double(), run.counts.patch_valid.double()


def _check_pair(causal: ProbeRun, bidirectional: ProbeRun) -> None:
    for run, mask in ((causal, "causal"), (bidirectional, "bidirectional")):
        if run.metrics["image_attention"] != mask:
            raise ValueError(f"{run.path} ran under {run.metrics['image_attention']!r}; expected the {mask} run there")
    for key in ("dataset", "images", "grid", "untrained"):
        if causal.metrics[key] != bidirectional.metrics[key]:
            raise ValueError(
                f"{causal.path} and {bidirectional.path} differ in {key}: {causal.metrics[key]!r}, "
                f"{bidirectional.metrics[key]!r}"
            )
    if causal.manifest["data"]["fingerprint"] != bidirectional.manifest["data"]["fingerprint"]:
        raise ValueError(f"{causal.path} and {bidirectional.path} were scored on different images")


def run(args: argparse.Namespace) -> None:
    """`probes starvation`."""
    facts = starvation(*map(ProbeRun, args.probes), args.site, args.seed)
    write_json(Path(args.out or args.probes[1]) / "starvation.json", facts)
    for patch in range(min(3, len(facts["gap"]))):
        low, high = facts["gap_ci95"][patch]
        gap = f"{facts['gap'][patch]:+.1%} [{low:+.1%}, {high:+.1%}]"
        print(f"patch {patch}: causal {facts['causal'][patch]:.1%}, bidirectional {gap}")
    row = facts["first_row"]
    print(f"first row: causal {row['causal']:.1%}, bidirectional {row['gap']:+.1%} at {facts['site']}")
