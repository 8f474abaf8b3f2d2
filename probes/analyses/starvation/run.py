"""`probes starvation`: are early patches worse off under causal attention (Sec. 5.1, Fig. 7, Table 3)?

Image tokens come in raster order. Under a causal mask, patch 0 attends to no other patch and the last one to all. Two
runs on the same images are compared by pixel accuracy under each patch at one site. The difference cancels effects of
content that both masks share: early patches are mostly sky and ceiling. One mask may still be better at these classes.
by_class.py therefore holds the classes fixed, and flipped.py flips the images.

A gap says that one probe, shared by all positions, reads early patches better under one mask. by_position.py gives
every position a probe of its own, since information may be there and only be encoded differently. dummy_tokens.py puts
tokens without information before the image, since early patches may lack an attention sink rather than context.

Runs of depth and normals are compared by the mean error of the pixels under each patch, with the probe that all
positions share; a boundary pixel has no error of its own. The further analyses are of segmentation only.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.bootstrap import bootstrap_weights
from llava_bidir.common.errors import UserError
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.analyses.replacement import check_replaceable
from probes.models.sites import ADAPTER
from probes.results.finished_run import warn_of_changed_data
from probes.results.probe_run import ProbeRun
from probes.results.task_run import TaskRun, open_run

from .by_class import class_results
from .by_position import position_results
from .dummy_tokens import dummy_token_results
from .flipped import FLIP_AXES, flip_results
from .patch_accuracy import CountsByMask, Estimate, accuracy_gap, first_gaps, patch_accuracy, patch_counts, pooled_gap


def starvation(
    causal: ProbeRun | TaskRun,
    bidirectional: ProbeRun | TaskRun,
    site: str | None = None,
    seed: int = 0,
    *,
    by_class: bool = False,
    flips: Sequence[str] = (),
    own_probe: bool = False,
    dummy_tokens: int = 0,
) -> dict:
    """Return the content of starvation.json: accuracy by patch of both runs, and the gap with paired intervals.

    Args:
        causal, bidirectional: Runs of a task on the same validation images. For other tasks than segmentation, values
            are mean errors, and the gap is causal minus bidirectional; "error" is their name.
        site: Site to compare both runs at; None for the causal run's best decoder layer.
        seed: Seed of the bootstrap.
        by_class, flips: Also with the classes held fixed, and on flipped images: see the modules of these names.
        own_probe: Also with a probe for each position: see `by_position.py`.
        dummy_tokens: Also with so many tokens without information before the image: see the module of this name.

    Raises:
        UserError: The runs differ in task, images, control or how probes were made, a run has no such site, or what
            is asked for is not defined for their task.
    """
    site, counts, weights = _read_pair(causal, bidirectional, site, seed)
    task = causal.task if isinstance(causal, TaskRun) else None
    if task:
        _check_options(causal, by_class, flips, own_probe, dummy_tokens)
    sign = -1 if task else 1
    runs = {run.metrics["image_attention"]: run for run in (causal, bidirectional)}
    results = {
        "runs": [causal.fingerprint, bidirectional.fingerprint],
        "site": site,
        "options": {
            **{"seed": seed, "by_class": by_class, "flips": list(flips)},
            **{"own_probe": own_probe, "dummy_tokens": dummy_tokens},
        },
        "grid": causal.metrics["grid"],
        "images": causal.metrics["images"],
        "untrained": causal.metrics["untrained"],
        **({"task": task.name, "error": task.pixel_error} if task else {}),
        **accuracy_gap(*patch_accuracy(counts, weights), sign),
        "first_row": pooled_gap(counts, weights, range(causal.metrics["grid"][1]), sign),
    }
    if by_class:
        results["by_class"] = class_results(causal, counts, weights)
    if flips:
        results["flips"] = [flip_results(runs, site, flip, counts, weights) for flip in flips]
    if own_probe:
        sites = list(dict.fromkeys([site, ADAPTER]))
        results["by_position"] = position_results(runs, sites, weights)
    if dummy_tokens:
        results["dummy_tokens"] = dummy_token_results(runs, site, dummy_tokens, counts, weights)
    if own_probe and dummy_tokens:
        by_position = position_results(runs, [site], weights, dummy_tokens)
        results["dummy_tokens"]["by_position"] = by_position
    return results


def shared_layer(causal: ProbeRun | TaskRun, bidirectional: ProbeRun | TaskRun) -> str | None:
    """Return the causal run's best decoder layer; None if it has no layers, or the other run lacks this one."""
    return causal.peak_layer if causal.peak_layer in bidirectional.sites else None


def gap_estimates(
    causal: ProbeRun, bidirectional: ProbeRun, site: str | None = None, seed: int = 0
) -> dict[str, Estimate]:
    """Return the gap at patch 0, "starvation", and over the first row, "starvation_first_row", with resampled values.

    The values are those of :func:`starvation`, whose arguments have the same names. Pairs of runs on the same images
    share the resamplings of a seed, so that their difference is paired.
    """
    _, counts, weights = _read_pair(causal, bidirectional, site, seed)
    return first_gaps(counts, weights, causal.metrics["grid"][1])


def _check_options(run: TaskRun, by_class: bool, flips: Sequence[str], own_probe: bool, dummy_tokens: int) -> None:
    """Raise a UserError if something is asked for that only runs of segmentation have."""
    options = {"--by-class": by_class, "--flip": flips, "--own-probe": own_probe, "--dummy-tokens": dummy_tokens}
    if wanted := [option for option, value in options.items() if value]:
        raise UserError(
            f"{run.path} has probes of the task {run.task_name}, but {' and '.join(wanted)} of `probes starvation` are "
            "for runs of segmentation; leave them out"
        )


def _read_pair(
    causal: ProbeRun | TaskRun, bidirectional: ProbeRun | TaskRun, site: str | None, seed: int
) -> tuple[str, CountsByMask, Tensor]:
    """Return the site, the counts there, and the bootstrap weights f64[R, N], of runs that can be compared."""
    _check_pair(causal, bidirectional)
    site = site or causal.peak_layer
    if site is None:
        raise UserError(f"{causal.path} has no decoder layer, and so no best one; choose a site by --site")
    counts = {run.metrics["image_attention"]: patch_counts(run, site) for run in (causal, bidirectional)}
    weights = bootstrap_weights(causal.metrics["images"], seed=seed, groups=causal.groups)
    return site, counts, weights.double()


def _check_pair(causal: ProbeRun | TaskRun, bidirectional: ProbeRun | TaskRun) -> None:
    for run, mask in ((causal, "causal"), (bidirectional, "bidirectional")):
        if (own := run.metrics["image_attention"]) != mask:
            raise UserError(f"{run.path} has image attention {own!r}; --probes takes the causal run, then the other")
    if causal.task_name != bidirectional.task_name:
        raise UserError(
            f"{causal.path} is a run of {causal.task_name}, {bidirectional.path} of {bidirectional.task_name}; compare "
            "runs of the same task"
        )
    older = {"match": "none", "draw": 0}  # of runs that do not state them
    for key in ("dataset", "images", "grid", "untrained", *older):
        if (ours := (older | causal.metrics)[key]) != (theirs := (older | bidirectional.metrics)[key]):
            raise UserError(
                f"{causal.path} and {bidirectional.path} differ in {key}: {ours!r} and {theirs!r}; compare runs on the "
                "same data, with the same weights replaced"
            )
    causal.check_same_probes(bidirectional)
    causal.check_same_images(bidirectional)


def run(args: argparse.Namespace) -> None:
    """Run `probes starvation`."""
    causal, bidirectional = map(open_run, args.probes)
    warn_of_changed_data([causal, bidirectional])
    flips = () if args.flip is None else args.flip or tuple(FLIP_AXES)
    out = Path(args.out or args.probes[1])
    with exclusive_run_lock(out, "starvation.json"):
        options = {"flips": flips} | {key: getattr(args, key) for key in ("by_class", "own_probe", "dummy_tokens")}
        made_from = {"runs": [causal.fingerprint, bidirectional.fingerprint], "site": args.site or causal.peak_layer}
        made_from |= {"options": {"seed": args.seed, **options}}
        check_replaceable(out / "starvation.json", made_from, args.overwrite)
        results = starvation(causal, bidirectional, args.site, args.seed, **options)
        write_files({out / "starvation.json": results})
    if "error" in results:
        _print_errors(results)
        return
    for patch in range(min(3, len(results["gap"]))):
        print(f"patch {patch}: {_format_gap({key: results[key][patch] for key in ('causal', 'gap', 'gap_ci95')})}")
    print(f"first row: {_format_gap(results['first_row'])} at {results['site']}")
    if args.by_class:
        print(f"first row, standardised classes: {_format_gap(results['by_class']['first_row'])}")
        for group in results["by_class"]["groups"]:
            print(f"first row, {group['frequency']} classes ({group['share']:.0%} of pixels): {_format_gap(group)}")
    for flip in results.get("flips", []):
        patches = f"patches {flip['patches'][0]}..{flip['patches'][-1]}"
        print(f"flipped images ({flip['flip']}), {patches}: {_format_gap(flip['position'])}")
        print(f"flipped images ({flip['flip']}), content of {patches}: {_format_gap(flip['content'])}")
        print(f"difference {_format_points(flip['moved'], flip['moved_ci95'])}; position or content: {flip['follows']}")
    for entry in results["by_position"]["sites"] if args.own_probe else ():
        _print_probes(entry)
    if dummy := results.get("dummy_tokens"):
        for mask, change in dummy["change"].items():
            patch, row = (_format_points(change[key]["value"], change[key]["ci95"]) for key in ("patch_0", "first_row"))
            print(f"{dummy['tokens']} dummy tokens before the image, {mask}: patch 0 {patch}, first row {row}")
        print(f"first row with dummy tokens: {_format_gap(dummy['first_row'])}")
        if args.own_probe:
            print("with dummy tokens, and probes solved with them:")
            _print_probes(dummy["by_position"]["sites"][0])


def _print_errors(results: dict) -> None:
    """Print the errors at the first patches and over the first row."""
    keys = ("causal", "bidirectional", "gap", "gap_ci95")
    first = [(f"patch {i}", {key: results[key][i] for key in keys}) for i in range(min(3, len(results["gap"])))]
    print(f"{results['error']} at {results['site']}; the difference is positive where bidirectional is better")
    for where, gap in [*first, ("first row", results["first_row"])]:
        if math.isnan(gap["gap"]):
            print(f"{where}: no labelled pixel")
            continue
        low, high = gap["gap_ci95"]
        difference = f"{gap['gap']:+.3g} [{low:+.3g}, {high:+.3g}]"
        print(f"{where}: causal {gap['causal']:.3g}, bidirectional {gap['bidirectional']:.3g}, difference {difference}")


def _print_probes(entry: dict) -> None:
    """Print the gaps at a site under one probe for all positions and under a probe for each."""
    for name, text in (("shared", "one probe for all positions"), ("own", "a probe for each position")):
        first = {key: entry[name][key][0] for key in ("causal", "gap", "gap_ci95")}
        for where, gap in (("patch 0", first), ("first row", entry[name]["first_row"])):
            print(f"{entry['site']}, {text}, {where}: {_format_gap(gap)}")
    read_out, row = entry["read_out"], entry["read_out"]["first_row"]
    patch, row = (
        _format_points(read_out["gap"][0], read_out["gap_ci95"][0]),
        _format_points(row["gap"], row["gap_ci95"]),
    )
    print(f"{entry['site']}, due to the shared probe: patch 0 {patch}, first row {row}")


def _format_gap(gap: dict) -> str:
    if math.isnan(gap["gap"]):
        return "no labelled pixel"
    bidirectional, difference = gap["causal"] + gap["gap"], _format_points(gap["gap"], gap["gap_ci95"])
    return f"causal {gap['causal']:.1%}, bidirectional {bidirectional:.1%}, difference {difference}"


def _format_points(value: float, ci95: list[float]) -> str:
    return "no labelled pixel" if math.isnan(value) else f"{value:+.1%} [{ci95[0]:+.1%}, {ci95[1]:+.1%}]"
