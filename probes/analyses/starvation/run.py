"""`probes starvation`: are early patches worse off under causal attention (Sec. 5.1, Fig. 7, Table 3)?

Image tokens come in raster order. Under a causal mask, patch 0 attends to no other patch and the last one to all. Two
runs on the same images are compared by pixel accuracy under each patch at one site. The difference cancels effects of
content that both masks share: early patches are mostly sky and ceiling. One mask may still be better at these classes.
by_class.py therefore holds the classes fixed. The first token may also be an attention sink (measured_sinks.py).
"""

import math
from collections.abc import Iterator

from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights
from llava_bidir.common.errors import UserError
from llava_bidir.common.files import exclusive_run_lock, write_files
from probes.analyses.measured_sinks import sinks_of_run
from probes.analyses.replacement import check_replaceable
from probes.runs.comparable import check_pair
from probes.runs.finished_run import warn_of_changed_data
from probes.runs.probe_run import ProbeRun
from probes.runs.study import MASKS

from . import StarvationOptions, sink_warning
from .by_class import class_results
from .patch_accuracy import (
    CountsByMask,
    accuracy_gap,
    patch_accuracy,
    patch_counts,
    pooled_gap,
)


def starvation(
    causal: ProbeRun,
    bidirectional: ProbeRun,
    site: str | None = None,
    seed: int = 0,
    *,
    by_class: bool = False,
    sinks: bool = False,
) -> dict:
    """Return the content of starvation.json: accuracy by patch of both runs, and the gap with paired intervals.

    Args:
        causal, bidirectional: Runs on the same validation images.
        site: Site to compare both runs at; None for the causal run's best decoder layer.
        seed: Seed of the bootstrap.
        by_class: Also with the classes held fixed, see by_class.py.
        sinks: Also measure attention sinks, see measured_sinks.py.

    Raises:
        UserError: The runs differ in images, control or how probes were made, or a run has no such site.
    """
    site, counts, weights = _read_pair(causal, bidirectional, site, seed)
    results = {
        "runs": [causal.fingerprint, bidirectional.fingerprint],
        "site": site,
        "options": {
            "seed": seed,
            "by_class": by_class,
            "sinks": sinks,
        },
        "grid": causal.metrics["grid"],
        "images": causal.metrics["images"],
        "untrained": causal.metrics["untrained"],
        **accuracy_gap(*patch_accuracy(counts, weights)),
        "first_row": pooled_gap(counts, weights, range(causal.metrics["grid"][1])),
    }
    if by_class:
        results["by_class"] = class_results(causal, counts, weights)
    if sinks:
        results["sinks"] = {run.mask: sinks_of_run(run) for run in (causal, bidirectional)}
    return results


def shared_layer(causal: ProbeRun, bidirectional: ProbeRun) -> str | None:
    """Return the causal run's best decoder layer; None if it has no layers, or the other run lacks this one."""
    return causal.peak_layer if causal.peak_layer in bidirectional.sites else None


def _read_pair(
    causal: ProbeRun,
    bidirectional: ProbeRun,
    site: str | None,
    seed: int,
) -> tuple[str, CountsByMask, Tensor]:
    """Return the site, the counts there, and the bootstrap weights f64[R, N], of runs that can be compared."""
    check_pair(causal, bidirectional)
    site = site or causal.peak_layer
    if site is None:
        raise UserError(
            f"{causal.path} has no decoder layer, and so no best one; choose a site by --site"
        )
    counts = {run.mask: patch_counts(run, site) for run in (causal, bidirectional)}
    weights = bootstrap_weights(causal.metrics["images"], seed=seed, groups=causal.groups)
    return site, counts, weights.double()


def run(options: StarvationOptions) -> None:
    """Run `probes starvation`."""
    causal, bidirectional = map(ProbeRun, options.probes)
    warn_of_changed_data([causal, bidirectional])
    out = options.out or options.probes[1]
    with exclusive_run_lock(out, "starvation.json"):
        made_from = {
            "runs": [causal.fingerprint, bidirectional.fingerprint],
            "site": options.site or causal.peak_layer,
            "options": {
                "seed": options.seed,
                "by_class": options.by_class,
                "sinks": options.sinks,
            },
        }
        check_replaceable(out / "starvation.json", made_from, options.overwrite)
        results = starvation(
            causal,
            bidirectional,
            options.site,
            options.seed,
            by_class=options.by_class,
            sinks=options.sinks,
        )
        write_files({out / "starvation.json": results})
    for where, gap in _gaps(results):
        print(f"{where}: {_format_gap(gap)}")
    if warning := sink_warning(results):
        print(warning)


def _gaps(results: dict) -> Iterator[tuple[str, dict]]:
    """Yield what is printed: where, and the gap there, or a difference of gaps."""
    keys = ("causal", "bidirectional", "gap", "gap_ci95")
    for patch in range(3):
        yield f"patch {patch}", {key: results[key][patch] for key in keys}
    yield "first row", results["first_row"]
    if by_class := results.get("by_class"):
        yield "first row, standardised classes", by_class["first_row"]


def _format_gap(gap: dict) -> str:
    if math.isnan(gap["gap"]):
        return "no labelled pixel"
    low, high = (f"{bound:+.1%}" for bound in gap["gap_ci95"])
    masks = "".join(f"{mask} {gap[mask]:.1%}, " for mask in MASKS if mask in gap)
    return f"{masks}difference {gap['gap']:+.1%} [{low}, {high}]"
