"""`probes learning_curve`: how many training images do the probes of each site need?

Subsets of the training images are nested and made of whole groups. Each is solved as all images were, with a strength
of its own, and scored on all validation images, over the classes that the run's mIoU is of.

learning_curve.json: "learning_curve": [{"site", "asked": number of images or "all", "images", "draw", "score"}],
"means": [{"site", "asked", "images", "miou", "ci95"}] over draws, with intervals over validation images,
"best": [{"asked", "images", "site"}], and "settled": the size from which on the best site is that of the largest one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_bidir.common.errors import UserError

from .analysis import Analysis, Result, Row, RunOptions, Section, table_row

if TYPE_CHECKING:  # this module answers `probes --help`
    from torch import Tensor

    from probes.runs.read import ProbeRun
    from probes.runs.study import StudyRuns

    from .charts import Curve

ALL = "all"
DRAWS = 3  # of each size but all


@dataclass(frozen=True, kw_only=True)
class LearningOptions(RunOptions):
    """How many training images.

    Args:
        images: Numbers of training images; all stands for those of the run.
    """

    images: tuple[str, ...] = ("10", "30", "100", ALL)


def check_sizes(texts: Sequence[str], images: int) -> None:
    """Raise a UserError unless texts are numbers below the training images, or "all"."""
    for text in texts:
        if text != ALL and not (text.isdecimal() and 1 < int(text) < images):
            raise UserError(
                f"--training_images {text}: expected numbers from 2 to {images - 1}, of the {images} training images "
                f"that there are, or {ALL}"
            )


def sizes_of(texts: Sequence[str]) -> list[int]:
    """Return the numbers among texts, from small to large."""
    return sorted({int(text) for text in texts if text != ALL})


def measure(run: "ProbeRun", options: LearningOptions) -> Result:
    """Return the scores of all subsets and sites.

    Raises:
        UserError: The probes were not solved, or a size is not one of fewer images than there are.
    """
    from probes.solve.subsets import count_subsets, read_solve_run

    if not run.is_solved:
        raise UserError(f"{run.path} has trained probes; expected a run of `probes solve`")
    solved = read_solve_run(run)
    images = len(solved.data.splits["training"])
    check_sizes(options.images, images)
    sizes = sizes_of(options.images)
    sums_by_size = {}
    images_of = {}
    if sizes:
        subsets, counted = count_subsets(solved, sizes, DRAWS)
        sums = run.task.sums(counted).unflatten(0, (len(sizes), DRAWS, -1))
        for i, size in enumerate(sizes):
            sums_by_size[size] = sums[i]
            images_of[size] = [len(subset) for subset in subsets[DRAWS * i : DRAWS * (i + 1)]]
    if ALL in options.images:
        sums_by_size[ALL] = run.sums_at(run.sites)[None]
        images_of[ALL] = [images]
    return Result(curve_rows(run, sums_by_size, images_of))


def curve_rows(
    run: "ProbeRun",
    sums_by_size: Mapping[int | str, "Tensor"],
    images_of: Mapping[int | str, Sequence[int]],
) -> dict[str, Any]:
    """Return the rows of learning_curve.json.

    Args:
        run: The run.
        sums_by_size: Sums per validation image of each draw and site, [D, S, N, M].
        images_of: Number of training images of each draw.
    """
    from probes.score.estimate import Estimate

    weights = run.weights.double()
    occurs = run.task.iou(run.sums_at(run.sites).sum(1)).isfinite()
    scores = []
    means = []
    best = []
    for size, sums in sums_by_size.items():
        counts = images_of[size]
        mean_count = sum(counts) / len(counts)
        by_site = {}
        for i, site in enumerate(run.sites):
            estimates = []
            for draw, count in enumerate(counts):
                of_draw = sums[draw, i].double()
                value = fixed_mean(run.task.iou(of_draw.sum(0)).nan_to_num(), occurs[i])
                resampled = fixed_mean(run.task.iou(weights @ of_draw), occurs[i])
                estimates.append(Estimate(value.item(), resampled))
                scores.append(
                    {
                        "site": site,
                        "asked": size,
                        "images": count,
                        "draw": draw,
                        "score": value.item(),
                    }
                )
            mean = Estimate.mean(estimates)
            by_site[site] = mean.value
            about = {"site": site, "asked": size, "images": mean_count, "miou": mean.value}
            means.append(about | {"ci95": mean.ci95})
        best.append({"asked": size, "images": mean_count, "site": max(by_site, key=by_site.get)})
    return {"learning_curve": scores, "means": means, "best": best, "settled": settled_size(best)}


def fixed_mean(iou: "Tensor", occurs: "Tensor") -> "Tensor":
    """Return the mean f64[...] of IoUs f64[..., K] over the classes bool[K] of the run that have pixels."""
    return iou[..., occurs].nanmean(-1)


def settled_size(best: Sequence[Row]) -> int | str:
    """Return the size from which on the best site is that of the largest one."""
    *_, last = best
    settled = last["asked"]
    for entry in reversed(best):
        if entry["site"] != last["site"]:
            break
        settled = entry["asked"]
    return settled


def lines(results: dict[str, Any]) -> Iterator[str]:
    """Yield the best site of each size."""
    for entry in results["best"]:
        yield f"{entry['images']:.4g} images: best at {entry['site']}"


def table_rows(results: dict[str, Any]) -> Iterator[Row]:
    """Yield the mIoU of each site and size."""
    for row in results["means"]:
        metric = f"miou_of_{row['asked']}"
        yield table_row(row["site"], metric=metric, value=row["miou"], interval=row["ci95"])


def section(study: "StudyRuns") -> Section:
    """Return the curves of a study, of each mask."""
    from .charts import Chart, Figure

    results_by_mask = {}
    for mask, run in study.solved.items():
        if results := run.analysis(ANALYSIS.result):
            results_by_mask[mask] = results
    rows = []
    figures = []
    sentences = []
    for mask, results in results_by_mask.items():
        rows += [{"image_attention": mask, **row} for row in results["learning_curve"]]
        sizes = [entry["images"] for entry in results["best"]]
        chart = Chart(
            curves=curves_of(results),
            ticks={place: f"{images:.4g}" for place, images in enumerate(sizes)},
            unit="mIoU, %",
        )
        shown = Figure(
            name=f"learning_curve_{mask}",
            title=f"mIoU by training images, {mask}",
            caption="Each site's mean over draws of the training images, in colour the best ones with 95% intervals "
            "over validation images.",
            panels=[chart],
            rows=results["learning_curve"],
        )
        figures.append(shown)
        by_size = [f"{entry['site']} of {entry['images']:.4g}" for entry in results["best"]]
        sentences.append(
            f"Best: {', '.join(by_size)} images; unchanged from {results['settled']} on."
        )
    return Section(figures, sentences, results={"learning_curve": rows} if rows else {})


def curves_of(results: Mapping[str, Any]) -> list["Curve"]:
    """Return a curve for each site; those that are best at a size are in colour, on top of the others."""
    from .charts import Curve, Point

    places = {entry["asked"]: place for place, entry in enumerate(results["best"])}
    best = list(dict.fromkeys(entry["site"] for entry in results["best"]))
    points: dict[str, list[Point]] = {}
    for row in results["means"]:
        low, high = row["ci95"]
        point = Point(
            places[row["asked"]], value=row["miou"], low=low, high=high, title=row["site"]
        )
        points.setdefault(row["site"], []).append(point)
    others = [Curve(points[site], style="thin") for site in points if site not in best]
    coloured = [
        Curve(points[site], name=site, colour=number, band=True, mark="circle")
        for number, site in enumerate(best)
    ]
    return others + coloured


ANALYSIS = Analysis(
    name="learning_curve",
    help="solve probes of subsets of the training images, into RUN/learning_curve.json",
    question="How many training images do the probes of each site need?",
    options=LearningOptions,
    measure=measure,
    lines=lines,
    rows=table_rows,
    title="Training images",
    section=section,
    of_encoders=True,
)
