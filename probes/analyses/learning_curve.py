"""`probes learning_curve`: how many training images do the probes of each site need?

Subsets of the training images are nested and made of whole groups. Each is solved as all images were, with a strength
of its own, and scored on all validation images, over the classes that the run's mIoU is of.

learning_curve.json: "learning_curve": [{"asked": number of images or "all", "images", "draw", "site", "score", "ci95":
over validation images}].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_bidir.common.errors import UserError

from .analysis import Analysis, Result, Row, RunOptions, Section

if TYPE_CHECKING:  # this module answers `probes --help`
    from pandas import DataFrame
    from torch import Tensor

    from probes.runs.read import ProbeRun
    from probes.runs.study import StudyRuns

    from .charts import Chart

ALL = "all"
DRAWS = 3  # of each size but all
CAPTION = (
    "Means over draws of the training images, and of their 95% intervals over validation images. In colour: sites that "
    "are the best at a size."
)


@dataclass(frozen=True, kw_only=True)
class LearningOptions(RunOptions):
    """How many training images.

    Args:
        images: Numbers of training images; all stands for those of the run.
    """

    images: tuple[str, ...] = ("10", "30", "100", ALL)


def check_sizes(texts: Sequence[str], images: int) -> list[int]:
    """Return the numbers among texts, from small to large.

    Raises:
        UserError: A text is neither "all" nor a number of fewer than all images.
    """
    for text in texts:
        if text != ALL and not (text.isdecimal() and 1 < int(text) < images):
            raise UserError(
                f"--training_images {text}: expected numbers from 2 to {images - 1}, not all of them, or {ALL}"
            )
    return sorted({int(text) for text in texts if text != ALL})


def measure(run: "ProbeRun", options: LearningOptions) -> Result:
    """Return the scores of all sizes, draws and sites.

    Raises:
        UserError: The probes were not solved, or a size is not one of fewer images than there are.
    """
    from probes.solve.subsets import SubsetRun, draw_subset

    if not run.is_solved:
        raise UserError(f"{run.path} has trained probes; expected a run of `probes solve`")
    solver = SubsetRun(run, options.folder / f"{ANALYSIS.name}.partial")
    groups = solver.groups
    seed = DRAWS * run.metrics["seed"]
    sizes = check_sizes(options.images, len(groups))
    drawn = [(size, draw) for size in sizes for draw in range(DRAWS)]
    subsets = [draw_subset(groups, images=size, seed=seed + draw) for size, draw in drawn]
    rows: list[Row] = []
    if subsets:
        sums = run.task.sums(solver.count(subsets)).unflatten(0, (len(subsets), -1))
        for (size, draw), subset, of_subset in zip(drawn, subsets, sums, strict=True):
            about = {"asked": str(size), "images": len(subset), "draw": draw}
            rows += [about | row for row in site_scores(run, of_subset)]
    if ALL in options.images:
        about = {"asked": ALL, "images": len(groups), "draw": 0}
        rows += [about | row for row in site_scores(run, run.sums_at(run.sites))]
    return Result({"learning_curve": rows})


def site_scores(run: "ProbeRun", sums: "Tensor") -> Iterator[Row]:
    """Yield the mIoU of each site from sums f[S, N, M], over the classes that occur with the run's own probes."""
    import torch

    from probes.score.estimate import Estimate

    images = run.weights.new_ones(1, sums.shape[1])
    weights = torch.cat([images, run.weights]).double()
    occurs = run.task.iou(run.sums_at(run.sites).sum(1)).isfinite()
    for site, of_site, classes in zip(run.sites, sums.double(), occurs, strict=True):
        ious = run.task.iou(weights @ of_site)[:, classes]
        # a class that is not labelled, and is predicted by the run's probes alone
        ious[0] = ious[0].nan_to_num()
        estimate = Estimate.from_vector(ious.nanmean(1))
        yield {"site": site, "score": estimate.value, "ci95": estimate.ci95}


def lines(results: dict[str, Any]) -> Iterator[str]:
    """Yield the best site of each size, and from which size on it no longer moves."""
    best = list(best_sites(mean_scores(results)).itertuples())
    for row in best:
        yield f"{row.images:.4g} images: best at {row.site}, {row.score:.1%}"
    settled = 0
    for size, row in enumerate(best):
        if row.site != best[-1].site:
            settled = size + 1
    yield f"The best site no longer moves from {best[settled].images:.4g} images on."


def mean_scores(results: dict[str, Any]) -> "DataFrame":
    """Return a row for each size and site: images, score, low and high, means over draws."""
    from pandas import DataFrame

    table = DataFrame(results["learning_curve"])
    table[["low", "high"]] = table["ci95"].tolist()
    by_size = table.groupby(["asked", "site"], sort=False)
    return by_size[["images", "score", "low", "high"]].mean().reset_index()


def best_sites(means: "DataFrame") -> "DataFrame":
    """Return the row of the best site of each size."""
    return means.loc[means.groupby("asked", sort=False)["score"].idxmax()]


def chart(results: dict[str, Any]) -> "Chart":
    """Return mIoU by size, a curve for each site, those that are best at a size in colour."""
    from .charts import Chart, Curve, Point

    means = mean_scores(results)
    best_by_size = best_sites(means)
    best = best_by_size["site"].unique().tolist()
    curves = []
    for site in sorted(means["site"].unique(), key=best.__contains__):
        rows = means[means["site"] == site].itertuples()
        points = [
            Point(x, value=row.score, low=row.low, high=row.high) for x, row in enumerate(rows)
        ]
        curve = Curve(points, style="thin")
        if site in best:
            curve = Curve(points, name=site, colour=best.index(site), band=True, mark="circle")
        curves.append(curve)
    ticks = {x: f"{images:.4g}" for x, images in enumerate(best_by_size["images"])}
    return Chart(curves, ticks, unit="mIoU, %")


def section(study: "StudyRuns") -> Section:
    """Return the curves of a study under each mask, and their rows."""
    from .charts import Figure

    rows: list[Row] = []
    figures = []
    sentences: list[str] = []
    for mask, run in study.solved.items():
        if curve := run.analysis(ANALYSIS.result):
            of_mask = [{"image_attention": mask, **row} for row in curve["learning_curve"]]
            rows += of_mask
            sentences += lines(curve)
            shown = Figure(
                name=f"learning_curve_{mask}",
                title=f"mIoU by training images, {mask}",
                caption=CAPTION,
                panels=[chart(curve)],
                rows=of_mask,
            )
            figures.append(shown)
    results = {"learning_curve": rows} if rows else {}
    return Section(figures, sentences, results=results)


ANALYSIS = Analysis(
    name="learning_curve",
    help="solve probes of subsets of the training images, into RUN/learning_curve.json",
    question="How many training images do the probes of each site need?",
    options=LearningOptions,
    measure=measure,
    lines=lines,
    title="Training images",
    section=section,
    of_encoders=True,
)
