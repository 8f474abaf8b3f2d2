"""`probes report`: claims, figures and tables of probe runs as one self-contained page.

OUT/index.html       the page; needs no network and no other file
OUT/results.json     claims and scores, in the format that other tools read
OUT/*.csv            every number of the page, as fractions 0..1
OUT/*.pdf, *.png     the figures

All files are written at the end, results.json last. An earlier report therefore stays until the new one is complete. Of
its files, which results.json lists, those that the new one lacks are then removed.

For several models or datasets, results.json lists one object per study under "studies", and figures of analyses are in
a folder for each study.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib as mpl

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import exclusive_run_lock, read_json, write_files
from probes.analyses import ANALYSES
from probes.analyses.base import Section, function_of
from probes.analyses.charts import Figure
from probes.data.verify import notes_of_run
from probes.runs import formatting
from probes.runs.formatting import Entry, Rows
from probes.runs.read import warn_of_changed_data
from probes.runs.steps import unfinished_steps
from probes.runs.study import StudyRuns, read_studies
from probes.tasks import SEGMENTATION

from .charts import STYLE, pdf_of
from .claims import evaluate_claims, joint_studies
from .compare import BEST_LAYER
from .options import ReportOptions
from .render import figures_of_sites, render_page
from .sites import table2
from .tables import Tables, make_tables
from .terminal import print_summary, summarize
from .verdicts import MARGIN

Files = dict[Path, str | bytes]  # contents by path, not yet written
Sections = dict[str, Section]  # of analyses by name
FORMATS = {
    "pdf": {"CreationDate": None},
    "png": {},
}  # of figures as files, and what they say of themselves


def write_report(
    texts: Iterable[str],
    out: str | Path,
    labels: Sequence[str] = (),
) -> Entry:
    """Write the report of studies to the folder `out` and return the content of results.json.

    Args:
        texts: See :func:`read_studies`.
        out: The folder.
        labels: Of a study's models, in order.
    """
    texts = [*texts]
    studies = read_studies(texts, labels)
    if studies[0].task.name != SEGMENTATION:
        raise UserError(
            "a report needs a run of segmentation beside those of other tasks; there is none"
        )
    folders = [text.rpartition("=")[2] for text in texts]
    unfinished = [entry for folder in folders for entry in unfinished_steps(folder)]
    out = Path(out)
    warn_of_changed_data(study.first for study in studies)
    with exclusive_run_lock(out), mpl.rc_context(STYLE):
        return _write_files(studies, out, unfinished)


def _write_files(
    studies: list[StudyRuns],
    out: Path,
    unfinished: list[dict[str, str]],
) -> Entry:
    main = [study for study in studies if study.task.name == SEGMENTATION]
    single = len(main) == 1
    claims = [evaluate_claims(study) for study in studies]
    joint = joint_studies(studies, claims)
    tables = make_tables(studies, claims, joint)
    sections = [study_sections(x, "" if single else f"{x.slug}/") for x in studies]
    files: Files = {
        out / f"{name}.csv": table.to_csv(index=False)
        for name, table in tables._asdict().items()
        if len(table)
    }
    files |= _csv_files({"table2": table2(main)}, out)
    for study, of_study in zip(studies, sections, strict=True):
        for section in of_study.values():
            files |= _csv_files(section.tables, out if single else out / study.slug)
            files |= _figure_files(section.figures, out)
    site_figures = figures_of_sites(tables)
    files |= _figure_files(site_figures, out)
    names = sorted(path.relative_to(out).as_posix() for path in files)
    page, summary = render_page(
        studies,
        tables,
        sections,
        site_figures,
        unfinished,
        names,
    )
    results = report_results(
        studies,
        claims,
        joint,
        tables,
        [_added_results(of_study) for of_study in sections],
    )
    results["summary"] = summarize(tables, *summary)
    results |= {"unfinished": unfinished} if unfinished else {}
    results |= {"files": names}
    earlier = _earlier_files(out)
    write_files(
        files
        | {
            out / "index.html": page,
            out / "results.json": results,
        }
    )
    for path in earlier - files.keys():
        path.unlink(missing_ok=True)
        with suppress(OSError):  # the folder of a study may have other files
            path.parent.rmdir()
    return results


def study_sections(study: StudyRuns, folder: str) -> Sections:
    """Return what the analyses show of a study; its figures are files in `folder` of the report."""
    sections = {}
    for name, analysis in ANALYSES.items():
        if analysis.title and study.task.name == SEGMENTATION:
            section = function_of(name, "section")(study)
            figures = [x._replace(name=folder + x.name) for x in section.figures]
            sections[name] = section._replace(figures=figures)
    return sections


def _added_results(sections: Sections) -> Entry:
    """Return what the analyses add to the results of a study."""
    added: Entry = {
        "results": {},
        "by_mask": {},
    }
    for section in sections.values():
        added["results"] |= section.results
        added["by_mask"] |= section.by_mask
    return added


def _earlier_files(out: Path) -> set[Path]:
    """Return the CSV files, figures and tables of the report that `out` holds."""
    file = out / "results.json"
    names = read_json(file).get("files", []) if file.is_file() else []
    return {
        out / name
        for name in names
        if ".." not in Path(name).parts and not Path(name).is_absolute()
    }


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
            drawn = io.BytesIO()
            pdf_of(figure).savefig(drawn, format=kind, metadata=metadata)
            files[out / f"{figure.name}.{kind}"] = drawn.getvalue()
        files |= _csv_files({figure.name: figure.rows}, out)
    return files


# ------------------------------------------------------------------------------------------------ results.json
def report_results(
    studies: Sequence[StudyRuns],
    claims: Sequence[list[Entry]],
    joint: Sequence[Entry],
    tables: Tables,
    added: Sequence[Entry],
) -> Entry:
    """Return the content of results.json.

    Its entries are those of the study itself, or, of several models, data sets or seeds, of each in "studies". Studies
    of other tasks are in "tasks".

    Args:
        studies: Of all tasks, those of segmentation first.
        claims: Of each study.
        joint: Over seeds.
        tables: Of the report.
        added: What analyses add to each study: {"results": ..., "by_mask": ...}.
    """
    labels = tables.models.set_index("name")["label"].to_dict()
    entries = [
        study_results(
            study,
            labels[study.name],
            of_study,
            more,
        )
        for study, of_study, more in zip(
            studies,
            claims,
            added,
            strict=True,
        )
    ]
    main = [x for x, study in zip(entries, studies, strict=True) if study.task.name == SEGMENTATION]
    several = {
        "seed": main[0]["seed"],
        "studies": main,
    }
    results = {
        "margin": MARGIN,
        "models": tables.models.to_dict("records"),
    }
    results |= main[0] if len(main) == 1 else several
    if joint:
        results["joint"] = [entry | {"model": labels[entry["model"]]} for entry in joint]
    if len(main) < len(entries):
        results["tasks"] = entries[len(main) :]
    return results | {"comparisons": comparisons(tables)}


def study_results(
    study: StudyRuns,
    label: str,
    claims: list[Entry],
    added: Mapping[str, Any],
) -> Entry:
    """Return the entries of one model on one data set."""
    masks = {
        mask: {
            "probing": run.metrics,
            "answer_accuracy": run.training.get("val/answer_accuracy"),  # None if not recorded
        }
        for mask, run in study.main_runs.items()
    }
    for name, found in added.get("by_mask", {}).items():
        for mask, entry in masks.items():
            entry[name] = found[mask]
    random: dict[str, list[Entry]] = {}
    for run in study.members:
        if run.arm == "trained" or any(run is other for other in study.untrained.values()):
            continue
        random.setdefault(run.mask, []).append({"probing": run.metrics})
    first = study.first
    return {
        "model": label,
        "dataset": study.dataset,
        "task": study.task.name,
        "has_llm": first.has_llm,
        "seed": first.metrics["seed"],
        "masks": masks,
        "controls": {
            "untrained": {mask: {"probing": run.metrics} for mask, run in study.untrained.items()},
            "random": random,
        },
        "claims": claims,
        "data_notes": notes_of_run(first.metrics.get("classes", []), first.manifest["data"]),
        **added.get("results", {}),
    }


def comparisons(tables: Tables) -> list[Entry]:
    """Return the differences of two models, b minus a, in points: of sites, best layers, and classes at these.

    Each has "dataset", "image_attention", "of", the labels "a" and "b", "site_a", "site_b", "value" and "ci95"; that of
    a class also "class", "photos" and "p_corrected", None if it is in too few photos to be tested.
    """
    labels = tables.models.set_index("key")["label"]
    rows = tables.differences
    rows = rows[(rows["between"] == "models") & (rows["task"] == SEGMENTATION)]
    found = []
    for row in rows[rows["of"].isin(["site", BEST_LAYER, "class"])].itertuples():
        entry = {
            "dataset": row.data,
            "image_attention": row.mask,
            "of": row.of,
            "a": labels[row.first],
            "b": labels[row.second],
            "site_a": row.site,
            "site_b": row.second_site,
            "value": 100 * row.difference,
            "ci95": [100 * row.low, 100 * row.high],
        }
        if row.of == "class":
            entry["class"] = row.name
            entry["photos"] = int(row.photos)
            entry["p_corrected"] = row.p if row.p == row.p else None
        found.append(entry)
    return found


def run(options: ReportOptions) -> None:
    """Run `probes report`."""
    results = write_report(options.studies, options.out, options.labels)
    print_summary(results["summary"], Path(options.out) / "index.html")
