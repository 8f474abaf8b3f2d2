"""`probes report`: claims, figures and tables of probe runs as one self-contained page.

OUT/index.html       everything; needs no network and no other file
OUT/results.json     claims and scores (the contract of tools that read on)
OUT/*.csv            every number of the page, fractions 0..1
OUT/*.png, *.pdf     its figures
"""

import argparse
import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np

from ..analyses.knockout import read_cases
from ..palette import palette_of
from ..results import ProbeRun, write_json
from . import figures, tables
from .claims import CONFUSED_SHARE, claims_of, confused_patches
from .figures import Drawn
from .study import Rows, Study, answer_accuracy, optional_json, total_seconds


@dataclass
class Picture:
    """A figure of the page: its file name, section, title, what to look for in it, and its width.

    Widths: "half" of the page, "full", or "wide": full, and on a phone to be scrolled.
    """

    name: str
    section: str
    title: str
    caption: str
    drawn: Drawn
    width: str = "full"


def results(study: Study, claims: list[dict[str, Any]], wall_s: float | None) -> dict[str, Any]:
    """What results.json holds."""

    def entry(run: ProbeRun) -> dict[str, Any]:
        return {"probing": run.metrics, "knockout": optional_json(run, "knockout.json")}

    return {
        "seed": study.first.metrics["seed"],
        "wall_s": wall_s,
        "masks": {m: entry(run) | {"answer_accuracy": answer_accuracy(run)} for m, run in study.trained.items()},
        "controls": {"untrained": {mask: entry(run) for mask, run in study.untrained.items()}},
        "starvation": study.starvation(),
        "claims": claims,
    }


def report(
    paths: list[str], out: str | Path, longer: list[str] | None = None, timings: str | None = None
) -> dict[str, Any]:
    """Writes the report of probe runs into `out` and returns what results.json holds.

    Args:
        paths: Folders of finished probe runs: one a mask, and their untrained controls.
        out: Folder.
        longer: Runs of the same models with longer-trained probes, shown beside.
        timings: A log of lines "start end step", to state how long it all took.
    """
    study, out = Study.of(paths, longer), Path(out)
    claims = claims_of(study)
    facts = results(study, claims, total_seconds(Path(timings)) if timings else None)
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(figures.STYLE):
        sections: dict[str, list[tuple[Picture, str]]] = {}
        for picture in draw(study):
            sections.setdefault(picture.section, []).append((picture, _save(picture, out)))
    tabular = _tables(study, claims, facts)
    for name, rows in tabular.items():
        tables.write_csv(out / f"{name}.csv", rows)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "points": _points}
    page = environment.get_template("page.html.j2").render(
        study=study,
        claims=claims,
        facts=facts,
        sections=sections,
        tables=tabular,
        confused_share=CONFUSED_SHARE,
        explorer=(out / "explorer.html").is_file(),
    )
    (out / "index.html").write_text(page)
    write_json(out / "results.json", facts)
    return facts


def draw(study: Study) -> Iterator[Picture]:
    """All figures that the study's runs have the results for."""
    run = study.first
    palette = palette_of(run.dataset())
    yield Picture(
        "layers",
        "Drop-off and recovery",
        "From drop-off to recovery",
        "Segmentation quality at every stage, as a linear probe reads it (Figs. 3 and 8). Look for the fall from "
        "encoder to adapter and the climb behind it; the dashed line marks the best layer and what it gains over the "
        "adapter. Dotted: the same model before training. Bands: 95% over images.",
        figures.layer_curves(study),
    )
    starvation = study.starvation()
    if starvation:
        yield Picture(
            "starvation",
            "Context starvation",
            "The gap by patch",
            "How much more accurate bidirectional attention is under each patch, in raster order "
            f"(Fig. 7, at {starvation['site']}). Look for the gap at the first patches, which see few or no others "
            "under causal attention, and for its decay. Lines: 95% over images.",
            figures.starvation_curve(starvation),
        )
        yield Picture(
            "starvation_grid",
            "Context starvation",
            "Where it starves",
            "The same gap where it lies in the image; it should fade from the top left on.",
            figures.starvation_grid(starvation),
            "half",
        )
    yield from _knockout_pictures(study)
    yield from _map_pictures(study, palette)
    for mask, run in study.trained.items():
        facts = optional_json(run, "umap.json")
        if facts:
            yield Picture(
                f"umap_{mask}",
                "Patches in two dimensions",
                f"Patches of one image, {mask}",
                "UMAP of the patches of one image, coloured by class (Fig. 5). It pulls clusters apart until they look "
                "clear, so trust the numbers above: the share of a patch's ten nearest neighbours, in the original "
                "space, that have its class.",
                figures.umap_panels(facts, run.metrics["classes"], palette),
            )
    yield Picture(
        "budget",
        "The probe's budget",
        "How much is the probe?",
        f"The curve of the first figure ({run.metrics['probe']['epochs']} epochs of probe training) after fewer epochs "
        "and, dashed, by probes trained for longer. Under-trained probes show how easily a class is read off, "
        "converged ones whether it is there: trust what does not change between the two.",
        figures.probe_budget(study),
    )


def _knockout_pictures(study: Study) -> Iterator[Picture]:
    section, selection = "Attention knockout", tables.selection_rows(study)
    for mask, run in study.trained.items():
        least = confused_patches(run)
        if read_cases(run, least) is None:
            continue
        yield Picture(
            f"knockout_{mask}",
            section,
            f"Wrong patches left, {mask}",
            f"Of images with {least} or more patches wrong at the adapter, the share still wrong at each layer "
            "(Fig. 11). The paper expects red, the wrong class hidden from all patches, below grey, and blue, the "
            "right class hidden, above it. Dotted: as many random patches hidden. Bands: 95% over images.",
            figures.knockout_curves(run, least),
            "half",
        )
    for mask, run in study.trained.items():
        if selection and read_cases(run, 1) is not None:
            yield Picture(
                f"knockout_selection_{mask}",
                section,
                f"Which images count, {mask}",
                "The same two effects, in the later half of the layers, by how many patches an image must have wrong. "
                "On the left single patches on a boundary dominate, on the right whole regions taken for another "
                "class. Dashed: where the claims are read.",
                figures.knockout_selection(selection, mask, confused_patches(run)),
                "half",
            )
    for mask, run in study.trained.items():
        if read_cases(run, confused_patches(run)) is not None:
            yield Picture(
                f"knockout_classes_{mask}",
                section,
                f"Class by class, {mask}",
                "The same curves by the class that the patches are wrongly called.",
                figures.knockout_by_class(run, confused_patches(run)),
                "wide",
            )


def _map_pictures(study: Study, palette: np.ndarray) -> Iterator[Picture]:
    for mask, run in study.trained.items():
        facts = optional_json(run, "maps.json")
        if not facts:
            continue
        yield Picture(
            f"maps_{mask}",
            "What the probes see",
            f"What the probes see, {mask}",
            "Predictions from the encoder to the best layer (Figs. 4 and 13), the first images of the split. Look for "
            "confusions that the adapter adds and the layers resolve.",
            figures.site_maps(run, palette),
            "wide",
        )
        for case in facts["knockout"]:
            yield Picture(
                f"knockout_maps_{mask}_{case['class'].replace(' ', '_')}",
                "What the probes see",
                f"{case['class']} for {case['correct_class']}, {mask}",
                f"The image with the most patches wrongly called {case['class']!r} beside some rightly called "
                f"{case['correct_class']!r}, layer by layer (Figs. 6 and 12): "
                "as it is, with the wrong class hidden, with the right one hidden.",
                figures.knockout_maps(run, case["class"], palette),
                "wide",
            )


def _tables(study: Study, claims: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Rows]:
    found = {"claims": tables.claim_rows(claims), "table2": tables.table2(study), "classes": tables.class_rows(study)}
    if facts["starvation"]:
        found["table3"] = tables.table3(facts["starvation"])
    selection = tables.selection_rows(study)
    return found | ({"knockout_selection": selection} if selection else {})


def _save(picture: Picture, out: Path) -> str:
    """Writes a figure as PNG, PDF and CSV; returns the PNG for the page."""
    picture.drawn.figure.savefig(out / f"{picture.name}.pdf", metadata={"CreationDate": None})
    buffer = io.BytesIO()
    picture.drawn.figure.savefig(buffer, format="png")
    (out / f"{picture.name}.png").write_bytes(buffer.getvalue())
    if picture.drawn.rows:
        tables.write_csv(out / f"{picture.name}.csv", picture.drawn.rows)
    return base64.b64encode(buffer.getvalue()).decode()


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def _points(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:+.{digits}f}".replace("-", "−")


def run(args: argparse.Namespace) -> None:
    """`probes report`."""
    facts = report(args.runs, args.out, args.longer, args.timings)
    for claim in facts["claims"]:
        low, high = (_points(bound) for bound in claim["ci95"])
        verdict = "holds" if claim["holds"] else "does NOT hold"
        control = f"   untrained {_points(claim['control']['value'])}" if claim["control"] else ""
        print(
            f"{claim['claim']:<21} {claim['image_attention']:<14} {_points(claim['value']):>6} [{low}, {high}]  "
            f"{verdict}{control}"
        )
    print(f"\n{Path(args.out) / 'index.html'}")
