"""`probes norms`: which patches are artefacts? The norm of each patch by site, in medians of those of its image.

Vision encoders can keep what they know of the picture in patches of its background: their norm is several times that of
others, and little can be read there of what they show (Darcet et al., Vision Transformers Need Registers, 2309.16588).
In an LLM, such a patch is an attention sink (sinks.py).

norms.json: "images", "outlier" (multiple of the median), "sites": {SITE: {"median": norm, mean over images; "largest":
in medians, mean over images; "outliers": share of patches from `outlier` on}}.
norms.safetensors: "photo" f32[S, h, w], of the first image in medians; "mean" f32[S, h, w], over images.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .analysis import Analysis, Result, Section
from .sinks import SinksOptions, first_images, relative_norms

if TYPE_CHECKING:  # this module answers `probes --help`
    from PIL import Image

    from probes.models.frozen_model import FrozenModel
    from probes.runs.read import ProbeRun
    from probes.runs.study import StudyRuns

    from .charts import Figure

OUTLIER_NORM = 3.0  # medians: DINOv2-g's artefacts are from 150 on, most other patches around 50
MOST_MAPS = 6


class NormsOptions(SinksOptions):
    """What to measure: on the same images as sinks. A command is told by the class of its options."""


def measure(run: "ProbeRun", options: NormsOptions) -> Result:
    """Return the norms at the run's sites on the first images of its split."""
    return measure_norms(run.mllm(), run.sites, first_images(run, options.limit))


def measure_norms(
    mllm: "FrozenModel", sites: Sequence[str], images: Sequence["Image.Image"]
) -> Result:
    """Return the content of norms.json, and the maps."""
    import torch

    norms = []
    medians = []
    for image in images:
        states = mllm.states(mllm.preprocess(image), sites)
        norms.append(torch.stack([relative_norms(states[site][0]).cpu() for site in sites]))
        medians.append([states[site][0].float().norm(dim=-1).median().item() for site in sites])
    relative = torch.stack(norms)  # [images, S, T]
    largest = relative.amax(2).mean(0).tolist()
    outliers = (relative >= OUTLIER_NORM).float().mean((0, 2)).tolist()
    median = torch.tensor(medians).mean(0).tolist()
    columns = zip(sites, median, largest, outliers, strict=True)
    by_site = {
        site: {"median": typical, "largest": most, "outliers": share}
        for site, typical, most, share in columns
    }
    rows = {"images": len(images), "outlier": OUTLIER_NORM, "sites": by_site}
    maps = relative.unflatten(2, mllm.grid)
    return Result(rows, {"photo": maps[0].contiguous(), "mean": maps.mean(0)})


def section(study: "StudyRuns") -> Section:
    """Return the maps and results of a study by mask; results.json["norms"] has those of the first mask by site."""
    by_mask: dict[str, Any] = {}
    figures = []
    for mask, main in study.main_runs.items():
        run = study.solved.get(mask, main)
        results = run.analysis(ANALYSIS.result)
        by_mask[mask] = results
        if results is not None:
            figures.append(norms_figure(run, results))
    measured = [results["sites"] for results in by_mask.values() if results is not None]
    of_first = {}
    if measured:
        of_first["norms"] = measured[0]
    return Section(figures, results=of_first, by_mask={"norms": by_mask})


def norms_figure(run: "ProbeRun", results: dict[str, Any]) -> "Figure":
    """Return maps of one photo, and the share of outliers by site."""
    from probes.runs.files import read_tensors

    from .charts import Figure, Grid

    sites = results["sites"]
    maps = read_tensors(run.path / "norms.safetensors")["photo"]
    grids = []
    step = math.ceil(len(sites) / MOST_MAPS)
    for number, site in list(enumerate(sites))[::-step]:  # the last one is among them
        unit = f"up to {sites[site]['largest']:.3g} medians"
        span = (0.0, max(OUTLIER_NORM, maps[number].max().item()))
        grids.append(Grid(maps[number].numpy(), title=site, unit=unit, span=span))
    rows = [{"site": site} | numbers for site, numbers in sites.items()]
    title = "Norms of patches"
    if run.has_llm:
        title += f", {run.mask}"
    caption = (
        f"Maps: norms in one photo, in medians; dark patches are outliers, which say little of what they show. Table: "
        f"share of outliers, patches of {OUTLIER_NORM:g} medians or more, in {results['images']} images."
    )
    return Figure(
        name=f"norms_{run.mask}",
        title=title,
        caption=caption,
        panels=grids[::-1],
        rows=rows,
        shows_rows=True,
    )


ANALYSIS = Analysis(
    name="norms",
    help="measure the norms of patches by site, into RUN/norms.json",
    question="Which patches are artefacts, with a norm far above that of others?",
    options=NormsOptions,
    measure=measure,
    title="Norms",
    section=section,
    default=True,
    of_encoders=True,
    of_any_task=True,
)
