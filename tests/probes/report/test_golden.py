"""Texts and tables of three synthetic studies against golden files.

After a change on purpose: `GOLDEN=write python -m pytest tests/probes/report/test_golden.py`, and look at the diff.
Numbers may differ in their last digit between machines; that they are right, the other tests of the report say.
"""

import csv
import html
import json
import os
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import knockouts
import numpy as np
import probe_runs
import pytest
import task_runs
import tiny_models
from report_parts import CURVE, FLAT

from probes.cli import main
from probes.runs.read import ProbeRun

GOLDEN = Path(__file__).parent / "golden"
MASKS = ("causal", "bidirectional")
ANCHORS = (-0.4, 0.4)  # what hiding the wrong and the correct class does to the share left wrong
NONE = (0.0, 0.0)
NOT_SHOWN = ("masks", "controls", "paired", "path_at_edge", "files")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")


# ------------------------------------------------------------------------------------------ studies
def claims(root: Path) -> None:
    """Every column of every claim: trained, solved and random probes of two masks, and planted truths."""
    (root / "classes.json").write_text(json.dumps({"classes": knockouts.CLASSES}))
    (root / "truth.json").write_text(json.dumps({"recovery": "planted", "adapter_drop": "absent"}))
    for mask in MASKS:
        options = {"root": root, "mask": mask}
        untrained = Path(f"{mask}_untrained")
        probe_runs.write_run(untrained, FLAT, untrained=True, **options)
        paths = [Path(f"{mask}_trained"), Path(f"{mask}_solved")]
        probe_runs.write_run(paths[0], CURVE, seed=1, **options)
        probe_runs.write_solved(paths[1], CURVE, seed=2, **options)
        for match, draw in product(("update", "permuted"), (0, 1)):
            weights = {"untrained": ["llm"], "match": match, "draw": draw}
            paths.append(Path(f"{mask}_{match}{draw}"))
            more = {"seed": len(paths), "metrics": weights}
            probe_runs.write_solved(paths[-1], quality=FLAT, **more, **options)
        for seed, path in enumerate(paths if mask == "causal" else []):
            effect = ANCHORS if seed < 2 else NONE
            effects = dict.fromkeys(knockouts.CLASSES, effect)
            tensors = knockouts.simulate(np.random.default_rng(seed), effects)
            knockouts.write_knockout(ProbeRun(path), tensors)


def models(root: Path) -> None:
    """Two models, of which the second one's probes are solved, on two data sets; one mask is not its own."""
    tiny_models.write_segmentation(root, 1, 1)
    for dataset, mask in (("ade20k", "causal"), ("ade20k", "bidirectional"), ("voc2012", "causal")):
        options = {"root": root, "mask": mask, "dataset": dataset}
        own = {"own_image_attention": "causal"}
        trained = Path(f"{dataset}_clip_{mask}")
        probe_runs.write_run(trained, CURVE, encoder="clip", metrics=own, **options)
        if dataset == "ade20k":
            solved = Path(f"{dataset}_siglip_{mask}")
            probe_runs.write_solved(solved, CURVE, encoder="siglip", **options)


def seeds(root: Path) -> None:
    """Three seeds with their untrained controls, and depth of two of them."""
    tiny_models.write_segmentation(root, 1, 1)
    for seed, untrained in product((0, 1, 2), (False, True)):
        name = f"{'untrained' if untrained else 'trained'}{seed}"
        options = {"root": root, "untrained": untrained, "seed": seed, "metrics": {"seed": seed}}
        quality = FLAT if untrained else CURVE
        probe_runs.write_run(Path(name), quality, dataset="toy", images=40 + seed, **options)
        if seed < 2:
            rmse = [0.5, 1.0, 1.1, 0.95, 0.96] if untrained else [0.5, 0.8, 0.7, 0.55, 0.56]
            task_runs.write_depth_run(Path(f"depth_{name}"), rmse, **options)


# ------------------------------------------------------------------------------------------ text
def text_of_page(page: str) -> str:
    """The text that a reader sees, a line for each block."""
    page = re.sub(r"(?s)<(style|svg).*?</\1>", "", page)
    page = re.sub(r"</(p|td|th|li|h\d|figcaption|summary|div)>", "\n", page)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "\n".join(line for line in lines if line)


def flat(value, name: str = "") -> Iterator[str]:
    """Lines "name = value" of nested results; numbers with six decimals."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{name}[{i}]")
    else:
        yield f"{name} = {json.dumps(json.loads(json.dumps(value), parse_float=lambda x: round(float(x), 6)))}"


def shortened(number: re.Match) -> str:
    return str(round(float(number[0]), 6))


def results_of(folder: Path) -> str:
    """The results of the first study and of all together, but copies of the runs' files, and hashes."""
    results = json.loads((folder / "results.json").read_text())
    results["studies"] = results.get("studies", [])[:1]
    for part in (results, *results["studies"]):
        for name in NOT_SHOWN:
            part.pop(name, None)
    return "\n".join(line for line in flat(results) if ".runs = " not in line)


def tables_of(folder: Path) -> str:
    """Columns, first and last row, and the number of rows of each CSV file."""
    parts = []
    for file in sorted(folder.rglob("*.csv")):
        with file.open() as lines:
            columns, *rows = csv.reader(lines)
        parts.append(f"{file.relative_to(folder)}: {len(rows)} rows")
        for row in (columns, rows[0], rows[-1]):
            parts.append(", ".join(re.sub(r"-?\d+\.\d+(e-?\d+)?", shortened, cell) for cell in row))
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------ comparison
def assert_same_text(found: str, expected: str, name: str) -> None:
    """Compare line by line; numbers up to one in the last digit that is written, or a thousandth."""
    assert found.count("\n") == expected.count("\n"), f"{name} has other lines; see the docstring"
    for ours, golden in zip(found.splitlines(), expected.splitlines(), strict=True):
        assert NUMBER.sub("#", ours) == NUMBER.sub("#", golden), name
        for a, b in zip(NUMBER.findall(ours), NUMBER.findall(golden), strict=True):
            digit = 10.0 ** -len(b.partition(".")[2]) if "e" not in b else 0.0
            allowed = 1e-3 * abs(float(b)) + (1.001 * digit if "." in b else 0) + 1e-6
            assert abs(float(a) - float(b)) <= allowed, f"{name}: {ours} for {golden}"


@pytest.mark.parametrize("study", [claims, models, seeds])
def test_a_report_says_what_its_golden_files_say(study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    study(Path("data"))
    main(["report", ".", "--out", "report"])
    folder = tmp_path / "report"
    found = {
        "terminal": capsys.readouterr().out,
        "page": text_of_page((folder / "index.html").read_text()),
        "results": results_of(folder),
        "tables": tables_of(folder),
    }
    for part, text in found.items():
        text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
        file = GOLDEN / study.__name__ / f"{part}.txt"
        if os.environ.get("GOLDEN") == "write":
            file.write_text(text)
        assert_same_text(text, file.read_text(), f"{study.__name__}/{part}.txt")
