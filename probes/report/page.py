"""`probes report`: claims, figures and tables of probe runs as one self-contained page.

OUT/index.html       everything; needs no network and no other file
OUT/results.json     claims and scores (the contract of tools that read on)
OUT/*.csv            every number of the page, fractions 0..1
OUT/*.png, *.pdf     its figures

All are written at the end, results.json last, so that what an earlier report left stays until all of this one is there.

Of several models or datasets, results.json lists one such object for each under "studies", and the files of each lie in
a folder of its own, those that compare them in OUT.
"""

import argparse
import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.report.figures.catalogue import pictures_of
from probes.report.figures.probe_entries import overview_pictures
from probes.report.figures.style import STYLE, ReportFigure
from probes.results.probe_run import ProbeRun

from . import tables
from .claims import CONFUSED_SHARE, claims_of
from .confusion import confusion_pairs
from .mask_comparison import paired
from .paper import PAPER
from .probe_sensitivity import over_seeds, scale_confound
from .study import Rows, Study, answer_accuracy, overridden, studies_of, total_seconds
from .summary_text import p_value, percent, points, remarks_of, span
from .templates import render

Sections = dict[str, list[tuple[ReportFigure, str]]]  # by title: figures, each with its PNG
Files = dict[Path, str | bytes]  # to be written


@dataclass
class Part:
    """What the page says of one study."""

    study: Study
    facts: dict[str, Any]
    remarks: dict[str, list[str]]
    sections: Sections
    tables: dict[str, Rows]
    overridden: dict[str, str]


def results(study: Study) -> dict[str, Any]:
    """What results.json holds of one model on one dataset."""

    def entry(run: ProbeRun) -> dict[str, Any]:
        return {"probing": run.metrics, "knockout": run.analysis("knockout.json")}

    by_mask = lambda look, runs: {mask: found for mask, run in runs.items() if (found := look(run))}
    return {
        "model": study.model,
        "dataset": study.dataset,
        "seed": study.first.metrics["seed"],
        "masks": {m: entry(run) | {"answer_accuracy": answer_accuracy(run)} for m, run in study.trained.items()},
        "controls": {"untrained": {mask: entry(run) for mask, run in study.untrained.items()}},
        "starvation": study.starvation(),
        "claims": claims_of(study),
        "paired": paired(study),
        "scale": by_mask(scale_confound, study.by_recipe),
        "seeds": by_mask(over_seeds, study.by_recipe),
        "confusion": by_mask(confusion_pairs, study.trained),
    }


def report(
    paths: list[str],
    out: str | Path,
    longer: Iterable[str] = (),
    recipes: Iterable[str] = (),
    timings: str | None = None,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Writes the report of probe runs into `out` and returns what results.json holds.

    Args:
        paths: Folders of finished probe runs: of each model and dataset one a mask, and their untrained controls.
        out: Folder.
        longer: Runs of the same models with longer-trained probes, shown beside.
        recipes: Runs of the same models with further recipes, where those in `paths` have none.
        timings: A log of lines "start end step", to state how long it all took.
        tensorboard: Also writes the figures for TensorBoard, into `out`/tensorboard.
    """
    studies, out = studies_of(paths, longer, recipes), Path(out)
    with exclusive_run_lock(out):
        return _write_report(studies, out, total_seconds(Path(timings)) if timings else None, tensorboard)


def _write_report(studies: list[Study], out: Path, wall_s: float | None, tensorboard: bool) -> dict[str, Any]:
    alone = len(studies) == 1
    files: Files = {}
    parts = [_part(study, out if alone else out / study.slug, files) for study in studies]
    overview: Sections = {}
    comparison = {"table2": tables.table2(studies), "table2_difference": tables.table2_difference(studies)}
    if not alone:
        overview = _draw_all(overview_pictures(studies), out, files)
    files |= _csv_files(comparison, out)
    page = render(
        "page.html.j2",
        {"percent": percent, "points": points, "p": p_value, "span": span},
        parts=parts,
        overview=overview,
        tables=comparison,
        paper=PAPER,
        wall_s=wall_s,
        confused_share=CONFUSED_SHARE,
        explorer=(out / "explorer.html").is_file(),
    )
    if tensorboard:
        from .tensorboard import write_events

        drawn = [
            (part.study.title, picture) for part in parts for each in part.sections.values() for picture, _ in each
        ]
        write_events(drawn, out / "tensorboard")
    found = [part.facts for part in parts]
    facts = {"wall_s": wall_s} | (found[0] if alone else {"seed": found[0]["seed"], "studies": found})
    write_files(files | {out / "index.html": page, out / "results.json": facts})
    return facts


def _part(study: Study, out: Path, files: Files) -> Part:
    """Works out what there is to say of a study; its figures and tables, which go into `out`, come to `files`."""
    facts = results(study)
    sections = _draw_all(pictures_of(study, facts), out, files)
    rows = _tables(study, facts)
    files |= _csv_files(rows, out)
    return Part(study, facts, remarks_of(facts), sections, rows, overridden(study))


def _tables(study: Study, facts: dict[str, Any]) -> dict[str, Rows]:
    found = {
        "claims": tables.claim_rows(facts["claims"]),
        "classes": tables.class_rows(study),
        "table3": tables.table3(facts["starvation"]) if facts["starvation"] else [],
        "knockout_selection": tables.selection_rows(study),
        "paired": tables.paired_rows(facts["paired"]) if facts["paired"] else [],
        "seed_spread": tables.seed_rows(facts["seeds"]),
    }
    return {name: rows for name, rows in found.items() if rows}


def _csv_files(found: dict[str, Rows], out: Path) -> Files:
    return {out / f"{name}.csv": tables.csv_text(rows) for name, rows in found.items() if rows}


def _draw_all(pictures: Iterable[ReportFigure], out: Path, files: Files) -> Sections:
    """Draws figures, which come to `files`; returns them by section, each with its PNG for the page."""
    sections: Sections = {}
    with mpl.rc_context(STYLE):
        for picture in pictures:
            drawn = _draw(picture, out)
            files |= drawn
            png = base64.b64encode(drawn[out / f"{picture.name}.png"]).decode()
            sections.setdefault(picture.section, []).append((picture, png))
    return sections


def _draw(picture: ReportFigure, out: Path) -> Files:
    png, pdf = io.BytesIO(), io.BytesIO()
    picture.drawn.figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    picture.drawn.figure.savefig(png, format="png")
    drawn = {out / f"{picture.name}.pdf": pdf.getvalue(), out / f"{picture.name}.png": png.getvalue()}
    return drawn | _csv_files({picture.name: picture.drawn.rows}, out)


def run(args: argparse.Namespace) -> None:
    """`probes report`."""
    facts = report(args.runs, args.out, args.longer, args.recipes, args.timings, args.tensorboard)
    for study in facts.get("studies", [facts]):
        if "studies" in facts:
            print(f"{study['model']}, {study['dataset']}")
        for claim in study["claims"]:
            verdict = "holds" if claim["holds"] else "does NOT hold"
            control = f"   untrained {points(claim['control']['value'])}" if claim["control"] else ""
            print(
                f"{claim['claim']:<21} {claim['image_attention']:<14} {points(claim['value']):>6} "
                f"{span(claim['ci95'])}  {verdict}{control}"
            )
        for mask, scale in study["scale"].items():
            for text in scale["verdict"].values():
                print(f"{mask}: {text}")
        print()
    print(Path(args.out) / "index.html")
