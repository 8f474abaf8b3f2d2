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
from collections.abc import Iterator, Sequence
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
from probes.results.study import MASKS
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
        print(f"{results['error']} at {results['site']}; the difference is positive where bidirectional is better")
    for where, gap in _gaps(results):
        print(f"{where}: {_format_gap(gap, '.3g' if 'error' in results else '.1%')}")


def _gaps(results: dict) -> Iterator[tuple[str, dict]]:
    """Yield what is printed: where, and the gap there, or a difference of gaps."""
    yield from _first_gaps(results)
    if by_class := results.get("by_class"):
        yield "first row, standardised classes", by_class["first_row"]
        for group in by_class["groups"]:
            yield f"first row, {group['frequency']} classes ({group['share']:.0%} of pixels)", group
    for flip in results.get("flips", ()):
        patches = f"patches {flip['patches'][0]}..{flip['patches'][-1]}"
        yield f"flipped images ({flip['flip']}), {patches}", flip["position"]
        yield f"flipped images ({flip['flip']}), content of {patches}", flip["content"]
        yield (
            f"position minus content; position or content: {flip['follows']}",
            _change(flip["moved"], flip["moved_ci95"]),
        )
    yield from _gaps_of_probes(results)
    if dummy := results.get("dummy_tokens"):
        for mask, change in dummy["change"].items():
            for key, entry in change.items():
                where = f"{dummy['tokens']} dummy tokens before the image, {mask}: {key.replace('_', ' ')}"
                yield where, _change(**entry)
        yield "first row with dummy tokens", dummy["first_row"]
        for where, gap in _gaps_of_probes(dummy):
            yield f"with dummy tokens, {where}", gap


def _first_gaps(gaps: dict) -> list[tuple[str, dict]]:
    """Return the gaps at the first three patches and over the first row."""
    by_patch = {key: gaps[key][:3] for key in ("causal", "bidirectional", "gap", "gap_ci95") if key in gaps}
    patches = [dict(zip(by_patch, values, strict=True)) for values in zip(*by_patch.values(), strict=True)]
    return [*((f"patch {i}", gap) for i, gap in enumerate(patches)), ("first row", gaps["first_row"])]


def _gaps_of_probes(results: dict) -> Iterator[tuple[str, dict]]:
    """Yield the gaps under one probe for all positions and under a probe for each, and their difference."""
    texts = {"shared": "one probe for all positions", "own": "a probe for each position"}
    for entry in results.get("by_position", {"sites": ()})["sites"]:
        for name, text in (texts | {"read_out": "due to the shared probe"}).items():
            yield from ((f"{entry['site']}, {text}, {where}", gap) for where, gap in _first_gaps(entry[name]))


def _change(value: float, ci95: list[float]) -> dict:
    return {"gap": value, "gap_ci95": ci95}


def _format_gap(gap: dict, digits: str) -> str:
    if math.isnan(gap["gap"]):
        return "no labelled pixel"
    low, high = (f"{bound:+{digits}}" for bound in gap["gap_ci95"])
    masks = "".join(f"{mask} {gap[mask]:{digits}}, " for mask in MASKS if mask in gap)
    return f"{masks}difference {gap['gap']:+{digits}} [{low}, {high}]"
