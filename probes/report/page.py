"""`probes report`: claims, figures and tables of probe runs as one self-contained page.

OUT/index.html       the page; needs no network and no other file
OUT/results.json     claims and scores, in the format that other tools read
OUT/*.csv            every number of the page, as fractions 0..1
OUT/*.png, *.pdf     the figures

All files are written at the end, results.json last. An earlier report therefore stays until the new one is complete. Of
its files, which results.json lists, those that the new one lacks are then removed.

For several models or datasets, results.json lists one object per study under "studies". Each study has its own folder
of files; figures and tables that compare studies are in OUT.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib as mpl

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import exclusive_run_lock, read_json, write_files
from probes.analyses.style import STYLE, ReportFigure
from probes.analyses.templates import render
from probes.runs import formatting
from probes.runs.finished_run import warn_of_changed_data
from probes.runs.formatting import Entry, Rows
from probes.runs.paper import PAPER
from probes.runs.steps import FAILED, LEFT_OUT, describe_steps, unfinished_steps
from probes.runs.study import (
    StudyRuns,
    overridden_masks,
    read_studies,
)
from probes.tasks import SEGMENTATION

from . import words
from .claim_table import (
    claim_notes,
    is_right,
    known_truths,
    summarize_claims,
    summarize_truths,
    tested_by_mask,
    tested_columns,
    verdict_reasons,
)
from .claims import evaluate_claims
from .figures.model_curves import overview_figures
from .headline import describe_study, describe_table, kinds_of_sites
from .options import ReportOptions
from .results import report_results, study_results
from .sections import study_sections
from .seeds import joint_studies
from .site_table import shown_rows, site_rows
from .sites import table2
from .tables import Tables, make_tables
from .terminal import front_rows, label_answer, lead_rows, print_summary, summarize

Drawn = list[tuple[ReportFigure, str]]  # figures, each with its PNG in base64
Files = dict[Path, str | bytes]  # contents by path, not yet written


def to_anchor(heading: str) -> str:
    """Return the heading as the name of a place in the page."""
    return "".join(c if c.isalnum() else "-" for c in heading.lower())


FILTERS = {  # of the page's template
    "anchor": to_anchor,
    "claim_notes": claim_notes,
    "describe_study": describe_study,
    "describe_table": describe_table,
    "kinds_of_sites": kinds_of_sites,
    "percent": formatting.format_percent,
    "points": formatting.format_points,
    "shown_sites": shown_rows,
    "summary": summarize_claims,
    "tested": tested_by_mask,
    "tested_columns": tested_columns,
    "verdict_reasons": verdict_reasons,
}


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
    everything: list[StudyRuns],
    out: Path,
    unfinished: list[dict[str, str]],
) -> Entry:
    studies = [study for study in everything if study.task.name == SEGMENTATION]
    task_studies = everything[len(studies) :]
    single = len(studies) == 1
    files: Files = {}
    parts = [
        _build_part(study, out, "" if single else f"{study.slug}/", files) for study in studies
    ]
    claims = [part["results"]["claims"] for part in parts]
    claims += [evaluate_claims(study) for study in task_studies]
    joint = joint_studies(everything, claims)
    made = make_tables(everything, claims, joint)
    for name, table in made._asdict().items():
        if len(table):
            files[out / f"{name}.csv"] = table.to_csv(index=False)
    paper = table2(studies)
    files |= _csv_files({"table2": paper}, out)
    added = [part["added"] for part in parts] + [{}] * len(task_studies)
    results = report_results(everything, claims, joint, made, added)
    by_study = results.get("studies", [results])
    page = render(
        "report/page.html.j2",
        FILTERS,
        parts=parts,
        joint=joint,
        comparisons=[],
        overview=[] if single else _draw(overview_figures(studies), out, files),
        table2=paper,
        paper=PAPER,
        truth_sentence=summarize_truths(by_study),
        failed=describe_steps(unfinished, FAILED),
        left_out=describe_steps(unfinished, LEFT_OUT),
    )
    metrics = studies[0].first.metrics
    photos = f"{metrics['dataset']}, {words.photos(metrics['images'])}"
    results["summary"] = summarize(made, _answer(made), photos)
    results |= {"unfinished": unfinished} if unfinished else {}
    results |= {"files": sorted(path.relative_to(out).as_posix() for path in files)}
    earlier = _earlier_files(out)
    write_files(files | {out / "index.html": page, out / "results.json": results})
    for path in earlier - files.keys():
        path.unlink(missing_ok=True)
        with suppress(OSError):  # the folder of a study may have other files
            path.parent.rmdir()
    return results


def _truth_rows(study: Entry) -> list[dict[str, Any]]:
    """Return a row for each claim of a study whose truth is known, and whether the verdict is right."""
    return [
        {
            "claim": text.name,
            "attention": text.mask if len(study["masks"]) > 1 else "",
            "truth": text.truth,
            "found": text.finding,
            "effects": text.effects,
            "right": is_right(text) if text.tested else None,
        }
        for _, text in known_truths([study])
    ]


def _earlier_files(out: Path) -> set[Path]:
    """Return the CSV files, figures and tables of the report that `out` holds."""
    file = out / "results.json"
    names = read_json(file).get("files", []) if file.is_file() else []
    return {
        out / name
        for name in names
        if ".." not in Path(name).parts and not Path(name).is_absolute()
    }


def _build_part(
    study: StudyRuns,
    out: Path,
    folder: str,
    files: Files,
) -> Entry:
    """Return what the template reads about a study; add its figures and tables, in `folder` of `out`, to `files`."""
    claims = evaluate_claims(study)
    out = out / folder
    sections = study_sections(study, claims)
    added: Entry = {"results": {}, "by_mask": {}}
    for section in sections:
        added["results"] |= section.content.results
        added["by_mask"] |= section.content.by_mask
    results = {"sites": site_rows(study)} | study_results(study, study.model, claims, added)
    drawn = [(section, _draw(section.content.figures, out, files)) for section in sections]
    first, *others = drawn[0][1]  # the curve by layer, which stands above all sections
    drawn[0] = (sections[0], others)
    for section in sections:
        files |= _csv_files(section.content.tables, out)
    return {
        "study": study,
        "folder": folder,
        "results": results,
        "added": added,
        "truths": _truth_rows(results),
        "first": first,
        "sections": [
            (section, figures) for section, figures in drawn if figures or section.content.shown
        ],
        "overridden_masks": overridden_masks(study),
    }


def _csv_files(rows_by_name: dict[str, Rows], out: Path) -> Files:
    return {
        out / f"{name}.csv": formatting.format_csv(rows)
        for name, rows in rows_by_name.items()
        if rows
    }


def _draw(figures: Iterable[ReportFigure], out: Path, files: Files) -> Drawn:
    """Draw figures, add their files to `files`, and return them with the PNG for the page."""
    drawn: Drawn = []
    for figure in figures:
        png = io.BytesIO()
        pdf = io.BytesIO()
        figure.data.figure.savefig(png, format="png")
        # keep the layout instead of computing it again
        figure.data.figure.set_layout_engine("none")
        figure.data.figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
        files |= {
            out / f"{figure.name}.pdf": pdf.getvalue(),
            out / f"{figure.name}.png": png.getvalue(),
        }
        files |= _csv_files({figure.name: figure.data.rows}, out)
        drawn.append((figure, base64.b64encode(png.getvalue()).decode()))
    return drawn


def _answer(tables: Tables) -> str:
    """Return where the first model reads best."""
    rows = lead_rows(front_rows(tables))
    best = rows.loc[rows["value"].idxmax()]
    place = f"{{{best['model']}}} segments best at {words.at_site(best['site'])}"
    return label_answer([f"{place}: {words.percent(best['value'])}% mIoU."], tables.models)


def run(options: ReportOptions) -> None:
    """Run `probes report`."""
    results = write_report(options.studies, options.out, options.labels)
    print_summary(results["summary"], Path(options.out) / "index.html")
