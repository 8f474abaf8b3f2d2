"""`probes starvation`: are early patches worse off under causal attention? (Sec. 5.1, Fig. 7, Table 3)

Image tokens come in raster order, so that under a causal mask patch 0 sees no other patch and the last one sees all.
Compared is the pixel accuracy under each patch at one site of two runs on the same images. The difference cancels what
position and content share: early patches are mostly sky and ceiling under both masks. It does not cancel that one mask
may be better at just these; starvation_classes.py holds the classes fixed, and starvation_flip.py turns the images.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.bootstrap import bootstrap_weights
from llava_bidir.common.errors import UserError
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.evaluation.metrics import peak_layer
from probes.results.probe_run import ProbeRun

from .by_class import class_facts
from .flipped import FLIPS, flip_facts
from .patch_accuracy import accuracies, gap_of, gap_over, patch_counts


def starvation(
    causal: ProbeRun,
    bidirectional: ProbeRun,
    site: str | None = None,
    seed: int = 0,
    *,
    by_class: bool = False,
    flips: Sequence[str] = (),
) -> dict:
    """What starvation.json holds: accuracy by patch of both runs, and the gap with paired intervals over images.

    Args:
        causal, bidirectional: Runs on the same validation images.
        site: Where both are compared; None takes the causal run's best decoder layer.
        seed: Of the bootstrap.
        by_class: Also with the classes held fixed, see starvation_classes.py.
        flips: Also with the images turned: horizontal, vertical, rotate, see starvation_flip.py.

    Raises:
        UserError: The runs do not belong together, or a run has no such site.
    """
    _check_pair(causal, bidirectional)
    site = site or peak_layer({entry["site"]: entry["miou"] for entry in causal.metrics["sites"]})
    runs = {run.metrics["image_attention"]: run for run in (causal, bidirectional)}
    counts = {mask: patch_counts(run, site) for mask, run in runs.items()}
    weights = bootstrap_weights(causal.metrics["images"], seed=seed, groups=causal.groups).double()
    facts = {
        "runs": [causal.fingerprint, bidirectional.fingerprint],
        "site": site,
        "grid": causal.metrics["grid"],
        "images": causal.metrics["images"],
        "untrained": causal.metrics["untrained"],
        **gap_of(*accuracies(counts, weights)),
        "first_row": gap_over(counts, weights, range(causal.metrics["grid"][1])),
    }
    if by_class:
        facts["by_class"] = class_facts(causal, counts, weights)
    if flips:
        facts["flips"] = [flip_facts(runs, site, flip, counts, weights) for flip in flips]
    return facts


def _check_pair(causal: ProbeRun, bidirectional: ProbeRun) -> None:
    for run, mask in ((causal, "causal"), (bidirectional, "bidirectional")):
        if run.metrics["image_attention"] != mask:
            raise UserError(f"{run.path} ran under {run.metrics['image_attention']!r}; expected the {mask} run there")
    for key in ("dataset", "images", "grid", "untrained"):
        if causal.metrics[key] != bidirectional.metrics[key]:
            raise UserError(
                f"{causal.path} and {bidirectional.path} differ in {key}: {causal.metrics[key]!r}, "
                f"{bidirectional.metrics[key]!r}"
            )
    causal.check_same_images(bidirectional)


def run(args: argparse.Namespace) -> None:
    """`probes starvation`."""
    causal, bidirectional = map(ProbeRun, args.probes)
    flips = () if args.flip is None else args.flip or FLIPS
    out = Path(args.out or args.probes[1])
    with exclusive_run_lock(out, "starvation.json"):
        facts = starvation(causal, bidirectional, args.site, args.seed, by_class=args.by_class, flips=flips)
        write_files({out / "starvation.json": facts})
    for patch in range(min(3, len(facts["gap"]))):
        gap = _points(facts["gap"][patch], facts["gap_ci95"][patch])
        print(f"patch {patch}: causal {facts['causal'][patch]:.1%}, bidirectional {gap}")
    print(f"first row: {_gap(facts['first_row'])} at {facts['site']}")
    if args.by_class:
        print(f"first row with the whole split's classes: {_gap(facts['by_class']['first_row'])}")
        for group in facts["by_class"]["groups"]:
            print(f"first row, {group['frequency']} classes ({group['share']:.0%} of pixels): {_gap(group)}")
    for flip in facts.get("flips", []):
        first = f"patches {flip['patches'][0]}..{flip['patches'][-1]}"
        print(f"images turned ({flip['flip']}), {first}: {_gap(flip['position'])}")
        print(f"where what they showed lies now: {_gap(flip['content'])}")
        print(f"difference {_points(flip['moved'], flip['moved_ci95'])}: the gap follows {flip['follows']}")


def _gap(facts: dict) -> str:
    return f"causal {facts['causal']:.1%}, bidirectional {_points(facts['gap'], facts['gap_ci95'])}"


def _points(value: float, ci95: list[float]) -> str:
    return f"{value:+.1%} [{ci95[0]:+.1%}, {ci95[1]:+.1%}]"
