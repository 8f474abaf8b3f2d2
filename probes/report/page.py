"""`probes report`: claims, figures and tables of probe runs as one self-contained page.

OUT/index.html       the page; needs no network and no other file
OUT/results.json     claims and scores, in the format that other tools read
OUT/summary.md, .tex  of several models or masks, a row for each
OUT/*.csv            every number of the page, as fractions 0..1
OUT/*.pdf, *.png     the figures

All files are written at the end, results.json last. An earlier report therefore stays until the new one is complete. Of
its files, which results.json lists, those that the new one lacks are then removed.

For several models or datasets, results.json lists one object per study under "studies", and figures of analyses are in
a folder for each study.
"""

import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from inspect import getmembers, isfunction
from pathlib import Path

import matplotlib as mpl
import numpy as np

from llava_bidir.common.files import exclusive_run_lock, read_json, write_files
from probes.analyses import ANALYSES
from probes.analyses.analysis import Section
from probes.analyses.charts import Figure
from probes.config import ReportOptions, split_label
from probes.data.verify import notes_of_run
from probes.report import charts, hero, parts, pictures, ranking, words
from probes.runs import formatting
from probes.runs.formatting import Entry, Rows
from probes.runs.pictures import names_of, read_pictures
from probes.runs.study import StudyRuns, overridden_masks, read_studies
from probes.steps.record import Outcome, describe_steps, unfinished_steps
from probes.tasks import SEGMENTATION, TASKS

from .best_layers import BEST_LAYER
from .claims import evaluate_claims, joint_studies
from .model_table import format_model_table
from .position import position_results
from .readings import MainRun, ReportView, SiteAxis, by_site, read_view
from .render import render
from .sites import shown_runs, table2
from .tables import Tables, make_tables
from .terminal import lab_command, print_summary, summarize
from .verdicts import FEWEST_UNITS, MARGIN

MODULES = (
    charts,
    hero,
    parts,
    pictures,
    ranking,
    words,
)  # whose functions the template uses as filters
FILTERS = {
    name: function for module in MODULES for name, function in getmembers(module, isfunction)
}
FILTERS |= {f.__name__: f for f in (names_of, notes_of_run, overridden_masks)}
Files = dict[Path, str | bytes]  # contents by path, not yet written
Sections = dict[str, Section]  # of analyses by name
# of figures as files, and what they say of themselves
FORMATS = {"pdf": {"CreationDate": None}, "png": {}}


def write_report(
    texts: Iterable[str],
    out: str | Path,
    labels: Sequence[str] = (),
    table1: Sequence[Path] = (),
    margin: float | None = None,
) -> Entry:
    """Write the report of studies to the folder `out` and return the content of results.json.

    Args:
        texts: See :func:`read_studies`.
        out: The folder.
        labels: Of a study's models, in order.
        table1: Files table1.json of `llava-bidir vqa`, for the table over models.
        margin: See :func:`read_studies`.
    """
    texts = [*texts]
    studies = read_studies(texts, labels, margin)
    unfinished = []
    for text in texts:
        _, folder = split_label(text)
        unfinished += unfinished_steps(folder)
    out = Path(out)
    with exclusive_run_lock(out), mpl.rc_context(charts.STYLE):
        main = main_studies(studies)
        single = len(main) == 1
        claims = [evaluate_claims(study) for study in studies]
        joint = joint_studies(studies, claims)
        tables = make_tables(studies, claims, joint)
        folders = [f"{study.slug}/" for study in studies]
        if single:
            folders = ["" for study in studies]
        sections = [study_sections(*of) for of in zip(studies, folders, strict=True)]
        files: Files = {
            out / f"{name}.csv": table.to_csv(index=False)
            for name, table in tables._asdict().items()
            if len(table)
        }
        files |= _csv_files({"table2": table2(main)}, out)
        for folder, of_study in zip(folders, sections, strict=True):
            for section in of_study.values():
                files |= _csv_files(section.tables, out / folder)
                files |= _figure_files(section.figures, out)
        main_runs = main_runs_of(studies, tables)
        view = read_view(tables, main_runs)
        sentences = hero.headline(view)
        if any(study.has_other_heads for study in studies):  # they are all trained
            sentences = [text.replace("were solved", "have trained probes") for text in sentences]
        site_figures = figures_of_sites(view)
        files |= _figure_files(site_figures, out)
        files |= format_model_table(view, runs=main_runs, table1=table1, out=out)
        names = sorted(path.relative_to(out).as_posix() for path in files)
        page = render_page(
            view,
            sentences=sentences,
            studies=studies,
            sections=sections,
            site_figures=site_figures,
            unfinished=unfinished,
            files=names,
        )
        results = report_results(
            studies, claims=claims, joint=joint, tables=tables, sections=sections
        )
        results["summary"] = summarize(view, sentences, studies[0].first)
        results["lab"] = lab_command(view, main_runs)
        if unfinished:
            results["unfinished"] = unfinished
        results["files"] = names
        earlier = _earlier_files(out)
        write_files(files | {out / "index.html": page, out / "results.json": results})
        for path in earlier - files.keys():
            path.unlink(missing_ok=True)
            with suppress(OSError):  # the folder of a study may have other files
                path.parent.rmdir()
    return results


def study_sections(study: StudyRuns, folder: str) -> Sections:
    """Return what the analyses show of a study; its figures are files in `folder` of the report."""
    sections = {}
    for name, analysis in ANALYSES.items():
        if analysis.title and (analysis.of_any_task or study.task.name == SEGMENTATION):
            section = analysis.section_of(study)
            figures = []
            for figure in section.figures:
                figures.append(figure._replace(name=folder + figure.name))
            sections[name] = section._replace(figures=figures)
    return sections


def main_studies(studies: Sequence[StudyRuns]) -> list[StudyRuns]:
    """Return the studies of the task that the page is about: segmentation, or the first one without."""
    return [study for study in studies if study.task is studies[0].task]


def _earlier_files(out: Path) -> set[Path]:
    """Return the CSV files, figures and tables of the report that `out` holds."""
    file = out / "results.json"
    if not file.is_file():
        return set()
    paths = [out / name for name in read_json(file).get("files", [])]
    return {path for path in paths if path.resolve().is_relative_to(out.resolve())}


def _csv_files(rows_by_name: dict[str, Rows], out: Path) -> Files:
    return {
        out / f"{name}.csv": formatting.format_csv(rows)
        for name, rows in rows_by_name.items()
        if rows
    }


def _figure_files(figures: Iterable[Figure], out: Path) -> Files:
    """Return each figure as PDF and PNG, and its numbers as CSV."""
    files: Files = {}
    for figure in figures:
        for kind, metadata in FORMATS.items():
            if not (figure.panels or figure.pictures):  # a table alone
                continue
            drawn = io.BytesIO()
            charts.pdf_of(figure).savefig(drawn, format=kind, metadata=metadata)
            files[out / f"{figure.name}.{kind}"] = drawn.getvalue()
        files |= _csv_files({figure.name: figure.rows}, out)
    return files


# ------------------------------------------------------------------------------------------------ page
def render_page(
    view: ReportView,
    sentences: Sequence[str],
    studies: Sequence[StudyRuns],
    sections: Sequence[Sections],
    site_figures: Sequence[Figure],
    unfinished: Sequence[dict[str, str]],
    files: Sequence[str],
) -> str:
    """Return the page.

    Args:
        view: Of the report's tables.
        sentences: The first ones (:func:`hero.headline`).
        studies: Of all tasks, segmentation first.
        sections: What the analyses show of each study, by name.
        site_figures: From :func:`figures_of_sites`; those with a caption are shown.
        unfinished: Steps that have no result.
        files: Names of the report's files.
    """
    analyses = {}
    for name in ANALYSES:
        analyses[name] = []
        for study, of_study in zip(studies, sections, strict=True):
            if name in of_study and of_study[name].figures:
                analyses[name].append((study, of_study[name]))
    return render(
        "report/page.html.j2",
        FILTERS,
        view=view,
        sentences=sentences,
        studies=studies,
        analyses={name: shown for name, shown in analyses.items() if shown},
        all_analyses=ANALYSES,
        site_figures=site_figures,
        failed=describe_steps(unfinished, Outcome.FAILED),
        left_out=describe_steps(unfinished, Outcome.LEFT_OUT),
        files=files,
        findings=parts.FINDINGS,
        fewest=FEWEST_UNITS,
        frame=charts.Frame,
        nan=np.nan,
        all_tasks=TASKS,
    )


def main_runs_of(studies: Sequence[StudyRuns], tables: Tables) -> dict[tuple, MainRun]:
    """Return the main runs with their photos, by task, data, key, mask and seed."""
    keys = tables.models.set_index("name")["key"]
    runs = {}
    for study in studies:
        for mask, run in shown_runs(study).items():
            seed = run.metrics["seed"]
            about = study.task.name, study.dataset, keys[study.name], mask, seed
            runs[about] = MainRun(run, pictures=read_pictures(run.path))
    return runs


def figures_of_sites(view: ReportView) -> list[Figure]:
    """Return the figures of scores by site: of all models, a PDF for each task, and inside the layers."""
    figures = []
    for task, of_task in parts.grouped(view.readings, "task").items():
        masks = list(dict.fromkeys(reading.mask for reading in of_task))
        panels = []
        for data, of_data in parts.grouped(of_task, "data").items():
            axis = SiteAxis(of_data)
            panels.append(by_site(of_data, axis, masks, banded=of_data[:1], title=data))
        name = "layers"
        if task != SEGMENTATION:
            name = f"layers_{task}"
        figures.append(Figure(name=name, title="Scores by site", caption="", panels=panels))
    return figures + parts.inside_layers(view.tables)


# ------------------------------------------------------------------------------------------------ results.json
def report_results(
    studies: Sequence[StudyRuns],
    claims: Sequence[list[Entry]],
    joint: Sequence[Entry],
    tables: Tables,
    sections: Sequence[Sections],
) -> Entry:
    """Return the content of results.json.

    Its entries are those of the study itself, or, of several models, data sets or seeds, of each in "studies". Studies
    of other tasks are in "tasks".

    Args:
        studies: Of all tasks, those of segmentation first.
        claims: Of each study.
        joint: Over seeds.
        tables: Of the report.
        sections: What analyses add to each study.
    """
    labels = tables.models.set_index("name")["label"].to_dict()
    main = []
    others = []
    of_main_task = main_studies(studies)
    for study, *of_study in zip(studies, claims, sections, strict=True):
        results_of_study = study_results(study, labels[study.name], *of_study)
        if study in of_main_task:
            main.append(results_of_study)
        else:
            others.append(results_of_study)
    results = {"margin": MARGIN, "models": tables.models.to_dict("records")}
    if of_main_task[0].task.name == SEGMENTATION:
        results["margin"] = of_main_task[0].task.margin
    if len(main) == 1:
        results |= main[0]
    else:
        results |= {"seed": main[0]["seed"], "studies": main}
    if joint:
        results["joint"] = []
        for entry in joint:
            label = labels[entry["model"]]
            results["joint"].append(entry | {"model": label})
    if others:
        results["tasks"] = others
    labels_by_key = tables.models.set_index("key")["label"].to_dict()
    results["position"] = position_results(tables.position, labels_by_key)
    return results | {"comparisons": comparisons(tables)}


def study_results(study: StudyRuns, label: str, claims: list[Entry], sections: Sections) -> Entry:
    """Return the entries of one model on one data set."""
    first = study.first
    masks = {
        mask: {
            "probing": run.metrics,
            "answer_accuracy": run.training.get("val/answer_accuracy"),  # None if not recorded
        }
        for mask, run in study.main_runs.items()
    }
    added = {}
    for section in sections.values():
        added |= section.results
        for name, by_mask in section.by_mask.items():
            for mask, entry in masks.items():
                entry[name] = by_mask[mask]
    random: dict[str, list[Entry]] = {}
    for run in study.members:
        if run.arm not in ("trained", "blank") and run not in study.untrained.values():
            random.setdefault(run.mask, []).append({"probing": run.metrics})
    untrained = {mask: {"probing": run.metrics} for mask, run in study.untrained.items()}
    for run in study.where(arm="blank"):
        masks[run.mask]["blank"] = {"probing": run.metrics}
    return {
        "model": label,
        "dataset": study.dataset,
        "task": study.task.name,
        "has_llm": first.has_llm,
        "seed": first.metrics["seed"],
        "masks": masks,
        "controls": {"untrained": untrained, "random": random},
        "claims": claims,
        "cuts": {cut: what_context_adds(study, under) for cut, under in study.cuts.items()},
        "data_notes": notes_of_run(first.metrics.get("classes", []), first.manifest["data"]),
        **added,
    }


def what_context_adds(study: StudyRuns, cut: StudyRuns) -> dict[str, Rows]:
    """Return {mask: rows} of the sites under a cut: the score, and how much more the model reads as it is, in both."""
    rows: dict[str, Rows] = {}
    for mask, run in cut.solved.items():
        rows[mask] = []
        intact = study.solved.get(mask, run).site_scores
        for site, score in run.site_scores.items():
            added = (intact[site] - score).json()
            row = {
                "site": site,
                "score": score.value,
                "added": added["value"],
                "ci95": added["ci95"],
            }
            rows[mask].append(row)
    return rows


def comparisons(tables: Tables) -> list[Entry]:
    """Return the differences of two models, and of two masks of a model, b minus a, in points.

    They are of sites, best layers, and classes at these. Each has "dataset", "image_attention", "of", the labels "a"
    and "b", "site_a", "site_b", "value" and "ci95", "finding", "detectable", and "p", None of a site or class that is
    not tested; of masks, "between" and the "model". That of best layers also has "p_holm"; that of a class "class",
    "photos" and "p_corrected", which is "p".
    """
    labels = tables.models.set_index("key")["label"]
    rows = tables.differences
    is_shown = rows["of"].isin(["site", BEST_LAYER, "class"])
    is_segmentation = rows["task"] == SEGMENTATION
    entries = []
    for row in rows[is_shown & is_segmentation].itertuples():
        entry = {
            "dataset": row.data,
            "image_attention": row.mask,
            "of": row.of,
            "a": labels.get(row.first, row.first),
            "b": labels.get(row.second, row.second),
            "site_a": row.site,
            "site_b": row.second_site,
            "value": 100 * row.difference,
            "ci95": [100 * row.low, 100 * row.high],
            "finding": row.finding,
            "p": None,
            "detectable": 100 * row.detectable,
        }
        if row.p == row.p:
            entry["p"] = row.p
        if row.between == "masks":
            entry |= {"between": "masks", "model": labels[row.model], "image_attention": None}
        if row.of == BEST_LAYER:
            entry["p_holm"] = row.p_holm
        if row.of == "class":
            entry["class"] = row.name
            entry["photos"] = int(row.photos)
            entry["p_corrected"] = entry["p"]
        entries.append(entry)
    return entries


def run(options: ReportOptions) -> None:
    """Run `probes report`."""
    results = write_report(
        options.studies,
        out=options.out,
        labels=options.labels,
        table1=options.table1,
        margin=options.margin,
    )
    page = Path(options.out) / "index.html"
    print_summary(results["summary"], page, lab=results["lab"])
