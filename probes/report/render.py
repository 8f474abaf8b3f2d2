"""The page, from the report's tables: which part has what, and what is left out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from probes.analyses import ANALYSES
from probes.analyses.base import Section
from probes.analyses.charts import Figure
from probes.data.verify import notes_of_run
from probes.report import parts, words
from probes.report.charts import Frame, colour_class, known, ticks
from probes.report.compare import LEFT_OUT as NOT_COMPARED
from probes.report.headline import claims_about, headline, plain_text
from probes.report.hero import TILE_WIDTH, choose_tiles, large_figure, tile_places
from probes.report.pictures import classes_in, first_map, map_of, map_uri, picture_uri, right_share
from probes.report.readings import (
    SiteAxis,
    SiteReading,
    by_site,
    lead_of,
    read_models,
    read_readings,
)
from probes.report.tables import Tables, by_claim
from probes.runs.pictures import names_of, read_pictures
from probes.runs.steps import FAILED, LEFT_OUT, describe_steps
from probes.runs.study import StudyRuns, overridden_masks, runs_to_compare
from probes.tasks import SEGMENTATION, TASKS

Entry = dict[str, Any]
CSS = Path(__file__).with_name("page.css")
PICTURES = ("picture", "scene", "drawn")  # words in names of data sets without photos
MISTAKES = 7  # sites at most at which a photo shows what is wrong


def noun_of(data: str) -> str:
    """Return what the images of a data set are called: photos, or pictures if they are drawn."""
    return "picture" if any(word in data.lower() for word in PICTURES) else "photo"


FILTERS = {
    function.__name__: function
    for function in (
        classes_in,
        colour_class,
        first_map,
        known,
        map_of,
        map_uri,
        noun_of,
        overridden_masks,
        picture_uri,
        right_share,
        parts.beyond,
        parts.is_right,
        parts.site_scale,
        words.axis_number,
        words.interval,
        words.key_parts,
        words.lower_first,
        words.p_value,
        words.percent,
        words.signed,
        words.site_name,
        words.the_site,
        words.tile_name,
    )
}


def render_page(
    studies: Sequence[StudyRuns],
    tables: Tables,
    sections: Sequence[Mapping[str, Section]],
    site_figures: Sequence[Figure],
    unfinished: Sequence[dict[str, str]],
    files: Sequence[str],
) -> tuple[str, tuple[str, str]]:
    """Return the page, and what the terminal says of it: the answer, and data with the number of photos.

    Args:
        studies: Of all tasks, segmentation first.
        tables: Of the report.
        sections: What the analyses show of each study, by name.
        site_figures: From :func:`figures_of_sites`; those with a caption are shown.
        unfinished: Steps that have no result.
        files: Names of the report's files.
    """
    readings = read_readings(tables, pictures_of(studies, tables))
    lead = lead_of(readings)
    of_task = [reading for reading in readings if reading.task == lead.task]
    front = [reading for reading in of_task if reading.data == lead.data]
    axis = SiteAxis(front)
    masks = list(dict.fromkeys(reading.mask for reading in front if reading.model.has_llm))
    models = read_models(tables.models)
    many = len(models) > 1
    claims = by_claim(tables.claims)
    found = parts.verdicts(claims, lead.task)
    pairs = pairs_of(tables, lead)
    answer, after = headline(
        lead,
        claims_about(claims, lead),
        pairs,
        many,
    )
    tiles = choose_tiles(axis, lead)
    compared = parts.model_differences(pairs)
    certificates = tables.certificates
    certificates = certificates[
        (certificates[["weights", "task"]] == ["trained", lead.task]).all(axis=1)
    ]
    draws = tables.draws.groupby(
        [
            "weights",
            "model",
            "mask",
            "task",
            "data",
            "seed",
        ]
    )["draw"].nunique()
    by_data = parts.grouped(of_task, "data")
    metrics = studies[0].first.metrics
    noun = noun_of(lead.data)
    page = render(
        "report/page.html.j2",
        FILTERS,
        css=Markup(CSS.read_text(encoding="utf8")),
        answer=answer,
        after=after,
        studies=studies,
        models=models,
        masks=masks,
        seeds=max([1, *tables.claims["seeds"]]),
        datasets=[*by_data],
        noun=noun,
        images=metrics["images"],
        classes=metrics["classes"],
        lead=lead,
        readings=front,
        sites=axis.sites,
        has_random=any(reading.draws for reading in front),
        failed=describe_steps(unfinished, FAILED),
        left_out=describe_steps(unfinished, LEFT_OUT),
        findings=parts.FINDINGS,
        verdicts=found,
        nan=float("nan"),
        frame=Frame,
        notes=notes_of_run,
        ticks=ticks,
        large_figure=large_figure(
            front,
            lead,
            axis,
            masks,
            tiles if lead.pictures else (),
        ),
        tiles=tiles,
        photos_shown=names_of(lead.pictures),
        places=tile_places(tiles),
        tile_width=TILE_WIDTH,
        panels=parts.panels(front, masks, axis) if many else [],
        compared=compared,
        pair_scale=parts.Scale([x for row in compared.values() for x in (row.low, row.high)]),
        not_compared=pairs.loc[pairs["of"] == NOT_COMPARED, "name"],
        mistake_sites=choose_tiles(axis, lead, MISTAKES),
        data_rows={data: parts.panels(own, masks, banded=True) for data, own in by_data.items()},
        class_rows=parts.class_rows(tables.classes, lead, pairs),
        tasks=other_tasks(readings, claims, masks),
        analyses=shown_sections(studies, tables, sections),
        site_figures=[figure for figure in site_figures if figure.caption],
        certificates=certificates,
        draws=draws.groupby("weights").max().to_dict(),
        not_tested=parts.not_tested(tables.claims, lead.model.has_llm),
        files=files,
    )
    labels = {key: model.label for key, model in models.items()}
    count = f"{metrics['images']} {noun}{'s' * (metrics['images'] != 1)}"
    return page, (plain_text([answer, *after], labels), f"{lead.data}, {count}")


def shown_sections(
    studies: Sequence[StudyRuns], tables: Tables, sections: Sequence[Mapping[str, Section]]
) -> list[Entry]:
    """Return the sections of the page that analyses fill: each has the studies that show something, by name."""
    names = dict.fromkeys(study.name for study in studies)
    keys = dict(zip(names, tables.models["key"], strict=True))
    several_data = tables.sites["data"].nunique() > 1
    found = []
    for name, analysis in ANALYSES.items():
        contents = []
        for study, of_study in zip(studies, sections, strict=True):
            own = of_study.get(name)
            if own and (own.figures or any(own.shown.values())):
                title = f"{{{keys[study.name]}}} {study.dataset * several_data}"
                contents.append(own._asdict() | {"name": title * (len(studies) > 1)})
        if contents:
            found.append(
                {
                    "anchor": name,
                    "analysis": analysis,
                    "contents": contents,
                }
            )
    return found


def pairs_of(tables: Tables, lead: SiteReading) -> pd.DataFrame:
    """Return the differences of models on the lead's data, under its mask if there are some."""
    table = tables.differences
    seeds = table["seed"].fillna(lead.seed)
    about = table.assign(seed=seeds)[["between", "task", "data", "seed"]]
    table = table[(about == ["models", lead.task, lead.data, lead.seed]).all(axis=1)]
    alike = table["mask"] == lead.mask
    return table[alike] if alike.any() else table


def other_tasks(readings: Sequence[SiteReading], claims: Any, masks: Sequence[str]) -> list[Entry]:
    """Return panels and claims of each other task than that of the first screen."""
    return [
        {
            "task": TASKS[name],
            "panels": parts.panels(own, masks, SiteAxis(own)),
            "verdicts": parts.verdicts(claims, name),
        }
        for name, own in parts.grouped(readings, "task").items()
        if name != SEGMENTATION
    ]


def pictures_of(studies: Sequence[StudyRuns], tables: Tables) -> dict[tuple, Entry]:
    """Return the photos of the main runs by task, data, key, mask and seed."""
    names = dict.fromkeys(study.name for study in studies)
    keys = dict(zip(names, tables.models["key"], strict=True))
    return {
        (
            study.task.name,
            study.dataset,
            keys[study.name],
            mask,
            run.metrics["seed"],
        ): read_pictures(run.path)
        for study in studies
        for mask, run in runs_to_compare(study)[0].items()
    }


def figures_of_sites(tables: Tables) -> list[Figure]:
    """Return the figures of scores by site: of all models, a PDF for each task, and inside the layers."""
    figures = []
    for task, of_task in parts.grouped(read_readings(tables), "task").items():
        masks = list(dict.fromkeys(reading.mask for reading in of_task))
        charts = [
            by_site(
                own,
                SiteAxis(own),
                masks,
                banded=own[:1],
                title=data,
            )
            for data, own in parts.grouped(of_task, "data").items()
        ]
        name = "layers" if task == SEGMENTATION else f"layers_{task}"
        figures.append(
            Figure(
                name,
                "Scores by site",
                "",
                charts,
            )
        )
    return figures + parts.inside_layers(tables)


def render(template: str, filters: dict[str, Callable] | None = None, **values: Any) -> str:
    """Return the page that a template makes of `values`; `filters` are added to Jinja's own.

    Templates are named by their path in the package, "lab/lab.html.j2".
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parents[1])
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,  # a name that no longer exists is an error, not empty text
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(**values)
