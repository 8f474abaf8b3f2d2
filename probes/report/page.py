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
from probes.data.label_counts import notes_of_run
from probes.runs import formatting
from probes.runs.finished_run import FinishedRun, warn_of_changed_data
from probes.runs.formatting import Entry, Rows
from probes.runs.paper import PAPER
from probes.runs.runs import finished_runs, open_run
from probes.runs.steps import FAILED, LEFT_OUT, describe_steps, unfinished_steps
from probes.runs.study import (
    UNTRAINED,
    StudyRuns,
    by_mask,
    given_labels,
    labels_of_models,
    overridden_masks,
    read_studies,
)
from probes.tasks import SEGMENTATION

from .claim_table import (
    claim_notes,
    claim_rows,
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
from .model_comparison import (
    compare_models,
    comparisons_in_points,
)
from .model_tables import (
    classes_of_pair,
    describe_comparison,
    group_comparisons,
    pair_table,
    table_of_all,
)
from .options import ReportOptions
from .sections import PageSection, study_sections
from .seeds import joint_studies
from .site_table import shown_rows, site_rows
from .sites import table2
from .tables import make_tables
from .terminal import format_results
from .verdicts import MARGIN

Drawn = list[tuple[ReportFigure, str]]  # figures, each with its PNG in base64
Files = dict[Path, str | bytes]  # contents by path, not yet written


def to_anchor(heading: str) -> str:
    """Return the heading as the name of a place in the page."""
    return "".join(c if c.isalnum() else "-" for c in heading.lower())


FILTERS = {  # of the page's template
    "anchor": to_anchor,
    "claim_notes": claim_notes,
    "classes_of_pair": classes_of_pair,
    "describe_comparison": describe_comparison,
    "describe_study": describe_study,
    "describe_table": describe_table,
    "kinds_of_sites": kinds_of_sites,
    "pair_table": pair_table,
    "percent": formatting.format_percent,
    "points": formatting.format_points,
    "shown_sites": shown_rows,
    "summary": summarize_claims,
    "table_of_all": table_of_all,
    "tested": tested_by_mask,
    "tested_columns": tested_columns,
    "verdict_reasons": verdict_reasons,
}


def study_results(study: StudyRuns, claims: list[Entry], sections: list[PageSection]) -> Entry:
    """Return the content of results.json for one model on one dataset."""
    by_mask = [entries for section in sections for entries in section.content.by_mask.items()]

    def entry(mask, run):
        return {
            "probing": run.metrics,
            "answer_accuracy": run.training.get("val/answer_accuracy"),  # None if not recorded
            **{name: found[mask] for name, found in by_mask},
        }

    random: dict[str, list[Entry]] = {}
    for run in _random_controls(study):
        random.setdefault(run.mask, []).append({"probing": run.metrics})
    results = {
        "model": study.model,
        "dataset": study.dataset,
        "has_llm": study.first.has_llm,
        "seed": study.first.metrics["seed"],
        "masks": {mask: entry(mask, run) for mask, run in study.main_runs.items()},
        "controls": {
            "untrained": {mask: {"probing": run.metrics} for mask, run in study.untrained.items()},
            "random": random,
        },
        "sites": site_rows(study),
        "claims": claims,
        "data_notes": notes_of_run(study.first.metrics["classes"], study.first.manifest["data"]),
    }
    for section in sections:
        results |= section.content.results
    return results


def _random_controls(study: StudyRuns) -> list[FinishedRun]:
    """Return the controls beside the untrained model: its further draws, random adapters, random and permuted LLMs."""
    untrained = [
        *by_mask(study.where(arm=UNTRAINED, solved=True)).values(),
        *study.untrained.values(),
    ]
    others = [run for run in study.members if run.arm != "trained" and run not in untrained]
    return sorted(others, key=lambda run: not run.is_solved)


def write_report(
    paths: Iterable[str],
    out: str | Path,
    task_runs: Iterable[str] = (),
    unfinished: Iterable[dict[str, str]] = (),
) -> Entry:
    """Write the report of probe runs to the folder `out` and return the content of results.json.

    Args:
        paths: See :func:`read_studies`.
        task_runs: The same, of other tasks than segmentation.
        unfinished: Steps that have no result, see :func:`unfinished_steps`.
    """
    studies = read_studies(paths)
    task_studies = read_studies(task_runs, FinishedRun)
    if not studies:
        raise UserError(
            "a report needs a run of segmentation beside those of other tasks; there is none"
        )
    out = Path(out)
    warn_of_changed_data(study.first for study in (*studies, *task_studies))
    with exclusive_run_lock(out), mpl.rc_context(STYLE):
        return _write_files(studies, out, task_studies, [*unfinished])


def _write_files(
    studies: list[StudyRuns],
    out: Path,
    task_studies: list[StudyRuns],
    unfinished: list[dict[str, str]],
) -> Entry:
    single = len(studies) == 1
    files: Files = {}
    parts = [
        _build_part(study, out, "" if single else f"{study.slug}/", files) for study in studies
    ]
    compared = compare_models(studies)
    paper = table2(studies)
    by_study = [part["results"] for part in parts]
    everything = [*studies, *task_studies]
    claims = [part["claims"] for part in by_study] + [evaluate_claims(x) for x in task_studies]
    joint = joint_studies(everything, claims)
    made = make_tables(everything, claims, joint)
    for name, table in made._asdict().items():
        if len(table):
            files[out / f"{name}.csv"] = table.to_csv(index=False)
    files |= _csv_files({"table2": paper}, out)
    page = render(
        "report/page.html.j2",
        FILTERS,
        parts=parts,
        joint=joint,
        comparisons=group_comparisons(compared),
        overview=[] if single else _draw(overview_figures(studies), out, files),
        table2=paper,
        paper=PAPER,
        truth_sentence=summarize_truths(by_study),
        failed=describe_steps(unfinished, FAILED),
        left_out=describe_steps(unfinished, LEFT_OUT),
    )
    several = {
        "seed": by_study[0]["seed"],
        "studies": by_study,
        "joint": joint,
        "compared": compared,
        "comparisons": comparisons_in_points(compared),
    }
    results = {"margin": MARGIN} | (by_study[0] if single else several)
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
    results = study_results(study, claims, sections)
    drawn = [(section, _draw(section.content.figures, out, files)) for section in sections]
    first, *others = drawn[0][1]  # the curve by layer, which stands above all sections
    drawn[0] = (sections[0], others)
    files |= _csv_files({"sites": results["sites"], "claims": claim_rows([results])}, out)
    for section in sections:
        files |= _csv_files(section.content.tables, out)
    return {
        "study": study,
        "folder": folder,
        "results": results,
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


def run(options: ReportOptions) -> None:
    """Run `probes report`."""
    runs, tasks = _expand_studies(options.runs, options.labels)
    folders = [folder for _, folder in map(_split_name, options.runs)]
    unfinished = [
        entry for folder in folders if Path(folder).is_dir() for entry in unfinished_steps(folder)
    ]
    results = write_report(runs, options.out, [*tasks, *options.tasks], unfinished)
    print(f"{format_results(results)}\n{Path(options.out) / 'index.html'}")


def _expand_studies(
    paths: Iterable[str], labels: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the runs of segmentation and those of other tasks; a study stands for all of its runs.

    Args:
        paths: Studies and runs; NAME=PATH names the model of either.
        labels: Labels of a study's models in the order of the report, by default those that it was given; others
            follow.
    """
    runs: list[str] = []
    tasks: list[str] = []
    for path in paths:
        name, folder = _split_name(path)
        is_run = (Path(folder) / "metrics.json").is_file()
        opened = [] if is_run else [open_run(run) for run in finished_runs(folder)]
        given = labels or given_labels(Path(folder))
        names = labels_of_models(Path(folder), opened, given)
        if names and not name:
            order = {label: i for i, label in enumerate(given)}
            opened.sort(key=lambda run: order.get(names[run.path], len(order)))
        for run in opened:
            label = " ".join(filter(None, (name, names.get(run.path))))
            named = f"{label}={run.path}" if label else str(run.path)
            (runs if run.task_name == SEGMENTATION else tasks).append(named)
        runs += [] if opened else [path]  # a folder without runs is then an error
    return runs, tasks


def _split_name(path: str) -> tuple[str, str]:
    """Return the name and the folder of NAME=FOLDER; "" and the folder without a name."""
    name, separator, folder = path.partition("=")
    return (name, folder) if separator and not Path(path).is_dir() else ("", path)
