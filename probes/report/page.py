"""`probes report`: claims, figures and tables of probe runs as one self-contained page.

OUT/index.html       the page; needs no network and no other file
OUT/results.json     claims and scores, in the format that other tools read
OUT/*.csv            every number of the page, as fractions 0..1
OUT/tables.tex       scores per site, claims and knockout in percent, for LaTeX with booktabs
OUT/*.png, *.pdf     the figures

All files are written at the end, results.json last. An earlier report therefore stays until the new one is complete. Of
its files, which results.json lists, those that the new one lacks are then removed.

For several models or datasets, results.json lists one object per study under "studies". Each study has its own folder
of files; figures and tables that compare studies are in OUT.
"""

import argparse
import base64
import io
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib as mpl

from llava_bidir.common.atomic_io import read_json, write_files
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.analyses.knockout.inference import knockout_inference
from probes.report.figures.beyond_classes import task_figures
from probes.report.figures.catalogue import study_figures
from probes.report.figures.layer_curves import overview_figures
from probes.report.figures.seeds import seed_figures
from probes.report.figures.style import STYLE, ReportFigure
from probes.results.finished_run import warn_of_changed_data
from probes.results.task_run import TaskRun, finished_runs, open_run
from probes.tasks import SEGMENTATION, TASKS

from . import latex, summary_text, tables
from .answers import answer_tables, study_answers
from .beyond_classes import joint_task_results, read_task_runs, task_results, task_table
from .claims import evaluate_claims
from .confusion import most_confused_pairs
from .mask_comparison import compare_masks
from .paper import PAPER
from .path import path_verdicts, sites_at_edge
from .seeds import joint_studies
from .study import Rows, Study, overridden_masks, read_studies, total_wall_s
from .summary_text import MASKS_SECTION, format_interval, format_points
from .task_starvation import joint_task_starvation, starvation_table, task_starvation
from .templates import render
from .verdicts import MARGIN

Sections = dict[str, list[tuple[ReportFigure, str]]]  # by title: figures, each with its PNG in base64
Files = dict[Path, str | bytes]  # contents by path, not yet written

FILTERS = {"points": format_points, "interval": format_interval}
FILTERS |= {"percent": summary_text.format_percent, "p": summary_text.format_p}
FILTERS |= {"verdict_reasons": summary_text.verdict_reasons, "count": summary_text.format_count}
FILTERS |= {"shift_sentences": summary_text.shift_sentences, "claim_notes": summary_text.claim_notes}
FILTERS |= {"describe_column": summary_text.describe_column}
FILTERS |= {"anchor": lambda text: "".join(c if c.isalnum() else "-" for c in text.lower())}


def study_results(study: Study) -> dict[str, Any]:
    """Return the content of results.json for one model on one dataset."""
    random = [run for kind in (study.solved_random, study.random) for runs in kind.values() for run in runs]
    scores = lambda run: {"probing": run.metrics, "knockout": run.analysis("knockout.json")}
    by_mask = lambda compute, runs: {mask: result for mask, run in runs.items() if (result := compute(run))}
    asked = study_answers(study)
    spoken = lambda mask, run: {
        "answer_accuracy": run.training.get("val/answer_accuracy"),  # None if not recorded
        "answers": asked.get(mask),  # None without `probes answers`
        "patching": (study.solved.get(mask) or study.trained[mask]).analysis("patching.json"),
    }
    return {
        "model": study.model,
        "dataset": study.dataset,
        "seed": study.first.metrics["seed"],
        "masks": {mask: scores(run) | spoken(mask, run) for mask, run in study.trained.items()},
        "controls": {
            "untrained": {mask: scores(run) for mask, run in study.untrained.items()},
            "random": {
                mask: [scores(run) for run in random if run.metrics["image_attention"] == mask]
                for mask in study.solved_random | study.random
            },
        },
        "starvation": study.starvation(),
        "claims": evaluate_claims(study),
        "knockout_inference": by_mask(knockout_inference, study.trained),
        "paired": compare_masks(study),
        "path": path_verdicts(study),
        "path_at_edge": {mask: sites_at_edge(run) for mask, run in study.solved.items()},
        "confusion": by_mask(most_confused_pairs, study.trained),
    }


def write_report(
    paths: Iterable[str],
    out: str | Path,
    timings: str | None = None,
    task_runs: Iterable[str] = (),
) -> dict[str, Any]:
    """Write the report of probe runs to the folder `out` and return the content of results.json.

    Args:
        paths: See :func:`read_studies`.
        timings: A log of lines "start end step", for the total wall time.
        task_runs: Runs of other tasks than segmentation.
    """
    others = read_task_runs(task_runs)
    studies, out = read_studies(paths), Path(out)
    warn_of_changed_data([*(study.first for study in studies), *others])
    with exclusive_run_lock(out):
        return _write_files(studies, out, total_wall_s(Path(timings)) if timings else None, others)


def _write_files(studies: list[Study], out: Path, wall_s: float | None, task_runs: list[TaskRun]) -> dict[str, Any]:
    single = len(studies) == 1
    files: Files = {}
    parts = [_build_part(study, out, "" if single else f"{study.slug}/", files) for study in studies]
    comparison = {"table2": tables.table2(studies), "table2_difference": tables.table2_difference(studies)}
    tasks, task_rows = _task_parts(task_runs)
    files |= _csv_files(comparison | task_rows, out)
    by_study = [part["results"] for part in parts]
    joint = joint_studies(studies, by_study)
    page = render(
        "page.html.j2",
        FILTERS,
        parts=parts,
        joint=[entry | {"summary": summary_text.summarize_claims(entry["claims"])} for entry in joint],
        joint_figures=_draw_figures(seed_figures(studies), out, files),
        overview={} if single else _draw_figures(overview_figures(studies), out, files),
        tables=comparison,
        task_figures=_draw_figures(task_figures(task_runs, tasks), out, files),
        task_tables=task_rows,
        paper=PAPER,
        wall_s=wall_s,
        masks_section=MASKS_SECTION,
        answers_section=summary_text.ANSWERS_SECTION,
        columns=summary_text.COLUMN_TITLES,
        marks=summary_text.MARKS,
        explorer=(out / "explorer.html").is_file(),
    )
    several = {"seed": by_study[0]["seed"], "studies": by_study, "joint": joint}
    results = {"wall_s": wall_s, "margin": MARGIN} | (by_study[0] if single else several)
    results |= {key: entries for key, entries in tasks.items() if entries}
    results |= {"files": sorted(path.relative_to(out).as_posix() for path in files)}
    earlier = _earlier_files(out)
    write_files(files | {out / "index.html": page, out / "results.json": results})
    for path in earlier - files.keys():
        path.unlink(missing_ok=True)
        with suppress(OSError):  # the folder of a study may have other files
            path.parent.rmdir()
    return results


def _earlier_files(out: Path) -> set[Path]:
    """Return the CSV files, figures and tables of the report that `out` holds."""
    file = out / "results.json"
    names = read_json(file).get("files", []) if file.is_file() else []
    return {out / name for name in names if ".." not in Path(name).parts and not Path(name).is_absolute()}


def _task_parts(runs: list[TaskRun]) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Rows]]:
    """Return what results.json has about other tasks than segmentation, and their tables."""
    tasks, starved = task_results(runs), task_starvation(runs)
    parts = {"tasks": tasks, "joint_tasks": joint_task_results(tasks)}
    parts |= {"tasks_starvation": starved, "joint_tasks_starvation": joint_task_starvation(starved)}
    labels = {name: task.labels for name, task in TASKS.items()}
    rows = {f"{key}_table": task_table(parts[key], labels) for key in ("tasks", "joint_tasks")}
    for key in ("tasks_starvation", "joint_tasks_starvation"):
        rows[f"{key}_table"] = starvation_table(parts[key])
    return parts, rows


def _build_part(study: Study, out: Path, folder: str, files: Files) -> dict[str, Any]:
    """Return what the template reads about a study; add its figures and tables, in `folder` of `out`, to `files`."""
    results, out = study_results(study), out / folder
    part = {
        "study": study,
        "folder": folder,
        "results": results,
        "claims_summary": summary_text.summarize_claims(results["claims"]),
        "summaries": summary_text.summarize_sections(results),
        "sections": _draw_figures(study_figures(study, results), out, files),
        "tables": tables.study_tables(study, results) | answer_tables(results),
        "overridden_masks": overridden_masks(study),
        "solved_main": study.first.is_solved,
    }
    files |= _csv_files(part["tables"], out)
    drawn = [figure for section in part["sections"].values() for figure, _ in section]
    knockout = [row for figure in drawn if figure.name.startswith("knockout_controls") for row in figure.data.rows]
    files[out / "tables.tex"] = latex.format_tables(study, results["claims"], knockout)
    return part


def _csv_files(rows_by_name: dict[str, Rows], out: Path) -> Files:
    return {out / f"{name}.csv": tables.format_csv(rows) for name, rows in rows_by_name.items() if rows}


def _draw_figures(figures: Iterable[ReportFigure], out: Path, files: Files) -> Sections:
    """Draw figures, add their files to `files`, and return them by section with the PNG for the page."""
    sections: Sections = {}
    with mpl.rc_context(STYLE):
        for figure in figures:
            png, pdf = io.BytesIO(), io.BytesIO()
            figure.data.figure.savefig(png, format="png")
            figure.data.figure.set_layout_engine("none")  # keep the layout instead of computing it again
            figure.data.figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
            files |= {out / f"{figure.name}.pdf": pdf.getvalue(), out / f"{figure.name}.png": png.getvalue()}
            files |= _csv_files({figure.name: figure.data.rows}, out)
            sections.setdefault(figure.section, []).append((figure, base64.b64encode(png.getvalue()).decode()))
    return sections


def run(args: argparse.Namespace) -> None:
    """Run `probes report`."""
    runs, tasks = _expand_studies(args.runs)
    results = write_report(runs, args.out, args.timings, [*tasks, *args.tasks])
    print(f"{format_results(results)}\n{Path(args.out) / 'index.html'}")


def _expand_studies(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the runs of segmentation and those of other tasks; a study stands for all of its runs."""
    runs: list[str] = []
    tasks: list[str] = []
    for path in paths:
        is_run = "=" in path or (Path(path) / "metrics.json").is_file()
        for run in [] if is_run else finished_runs(path):
            (runs if open_run(run).task_name == SEGMENTATION else tasks).append(str(run))
        runs += [path] if is_run or not finished_runs(path) else []  # which is then an error
    return runs, tasks


def format_results(results: dict[str, Any]) -> str:
    """Return the verdicts of results.json as text."""
    lines = []
    for joint in results.get("joint", []):
        lines += [f"{joint['model']}, {joint['dataset']}, seeds {', '.join(map(str, joint['seeds']))} jointly"]
        lines += [summary_text.format_claims(joint["claims"]), ""]
    for study in results.get("studies", [results]):
        lines += [f"{study['model']}, {study['dataset']}"] if "studies" in results else []
        lines += [summary_text.format_claims(study["claims"])]
        lines += [*summary_text.summarize_path(study["path"], study["path_at_edge"]), ""]
    return "\n".join(lines)
