"""What the report shows of UMAP projections (Fig. 5)."""

import numpy as np

from probes.analyses.analysis import Section
from probes.analyses.charts import Chart, Curve, Figure, Point
from probes.data.image_dataset import palette_of
from probes.runs.formatting import Rows
from probes.runs.study import StudyRuns

from . import ImageEmbedding, SiteEmbedding

NAMED_CLASSES = 4  # all others are grey


def section(study: StudyRuns) -> Section:
    """Return the section of a study: a figure for each image of each run, whose colours need the dataset."""
    figures: list[Figure] = []
    for mask, run in study.main_runs.items():
        result = run.analysis("umap.json")
        if not result:
            continue
        palette = palette_of(study.first.dataset())
        classes = run.metrics["classes"]
        for image in result["images"]:
            shown = Figure(
                name=f"umap_{mask}_{image['image']}",
                title=f"Patches of image {image['name']}, {mask}",
                caption=(
                    "UMAP of the patches of one image, coloured by class (Fig. 5). UMAP exaggerates the gaps between "
                    "clusters, so rely on the numbers above the panels: the share of a patch's ten nearest neighbours "
                    "in the original space that have its class."
                ),
                panels=[
                    umap_chart(entry, labels=image["labels"], classes=classes, palette=palette)
                    for entry in image["sites"]
                ],
                rows=umap_rows(image),
            )
            figures.append(shown)
    return Section(figures)


def umap_chart(
    entry: SiteEmbedding, labels: list[int], classes: list[str], palette: np.ndarray
) -> Chart:
    """Return the patches of one image in two dimensions at a site; all but the commonest classes are grey (Fig. 5)."""
    labelled = np.array([label for label in labels if label >= 0], int)
    frequency = np.bincount(labelled, minlength=len(classes))
    common = [int(k) for k in np.argsort(-frequency)[:NAMED_CLASSES] if frequency[k]]
    looks = {None: ("other", "grey")}
    looks |= {k: (classes[k], "#{:02x}{:02x}{:02x}".format(*palette[k])) for k in common}
    curves = []
    for k, (name, colour) in looks.items():
        points = []
        for (x, y), label in zip(entry["xy"], labels, strict=True):
            if label == k or (k is None and label not in common):
                points.append(Point(x, y))
        curves.append(Curve(points=points, name=name, colour=colour, style="dots", mark="circle"))
    purity = entry["knn_purity"]
    share = "unknown"
    if purity is not None:
        share = f"{purity:.0%}"
    return Chart(
        curves,
        {},
        entry["site"].replace("_", " "),
        f"neighbours of the same class: {share}",
        scale=1,
    )


def umap_rows(image: ImageEmbedding) -> Rows:
    """Return the rows of the CSV file: a row per site and patch."""
    return [
        {"site": entry["site"], "patch": i, "label": int(image["labels"][i]), "x": x, "y": y}
        for entry in image["sites"]
        for i, (x, y) in enumerate(entry["xy"])
    ]
