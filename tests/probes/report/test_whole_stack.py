"""The figure from the pixels to the last layer, and the other figures of a run with the encoder's own layers."""

import json
from pathlib import Path

import probe_runs
import pytest
import tiny_models

from probes.cli import main
from probes.report.figures.layer_curves import layer_curves, stack_curve, stack_figures
from probes.results.study import read_studies

IN_ENCODER = [0.2, 0.3, 0.5, 0.6]
SITES = [f"encoder_{i:02d}" for i in range(4)]
SITES += ["encoder", "adapter", "layer_01", "layer_02", "layer_03", "final_norm"]
OF_LLM = [0.55, 0.4, 0.45, 0.5, 0.42, 0.42]  # encoder, adapter, three layers, final norm


@pytest.fixture
def write(tmp_path):
    root = tiny_models.write_segmentation(tmp_path / "data", 1, 1)

    def write(mask: str, *, encoder_layers: bool) -> str:
        quality = [*IN_ENCODER, *OF_LLM] if encoder_layers else OF_LLM
        sites = SITES if encoder_layers else SITES[4:]
        out = tmp_path / f"{mask}_{len(sites)}"
        return str(
            probe_runs.write_run(
                out,
                quality,
                root=root,
                mask=mask,
                sites=sites,
            )
        )

    return write


def lines_of(axes) -> list[tuple[list[float], list[float]]]:
    """Return x and y of the curves in axes, without lines that are one vertical stroke."""
    curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in curves]


def test_the_curve_has_every_site_in_forward_order(write):
    (study,) = read_studies([write(mask, encoder_layers=True) for mask in ("causal", "prefix")])
    figure, rows = stack_curve(study.main_runs)
    (axes,) = figure.axes
    for (x, y), run in zip(lines_of(axes), study.main_runs.values(), strict=True):
        scores = {entry["site"]: entry["miou"] for entry in run.metrics["sites"]}
        assert x == list(range(9))
        assert y == pytest.approx([100 * scores[site] for site in SITES[:-1]])
    assert len(rows) == 20, "with final norm, of both runs"


def test_random_llms_are_points_at_the_layers_of_the_llm(write, tmp_path):
    path = write("causal", encoder_layers=True)
    random = write("causal", encoder_layers=False)
    file = Path(random) / "metrics.json"
    control = {"untrained": ["llm"], "match": "update", "draw": 0}
    file.write_text(json.dumps(json.loads(file.read_text()) | control))
    (study,) = read_studies([path, random])
    (figure,) = stack_figures(study)
    (axes,) = figure.data.figure.axes
    _, (x, y) = lines_of(axes)
    assert x == [SITES.index(f"layer_{i:02d}") for i in (1, 2, 3)]
    (run,) = study.where(arm="random")
    scores = {entry["site"]: entry["miou"] for entry in run.metrics["sites"]}
    assert y == pytest.approx([100 * scores[f"layer_{i:02d}"] for i in (1, 2, 3)])
    assert len(figure.data.rows) == 16, "of both runs"


def test_other_figures_and_numbers_are_those_without_the_encoders_layers(write, tmp_path):
    """Also under both masks, where layers before the LLM have nothing to compare."""
    masks = ("causal", "bidirectional")
    plain = [write(mask, encoder_layers=False) for mask in masks]
    stacked = [write(mask, encoder_layers=True) for mask in masks]
    (study,) = read_studies(stacked)
    (reference,) = read_studies(plain)
    assert not [*stack_figures(reference)] and len([*stack_figures(study)]) == 1
    x = [line[0] for line in lines_of(layer_curves(study, False).figure.axes[0])]
    expected = [line[0] for line in lines_of(layer_curves(reference, False).figure.axes[0])]
    assert x == expected == [[-1, 0, 1, 2, 3]] * 2
    main(["report", *stacked, "--out", str(tmp_path / "report")])
    compared = json.loads((tmp_path / "report/results.json").read_text())["paired"]["sites"]
    sites = [entry["site"] for entry in compared]
    assert sites == ["encoder", "adapter", "layer_01", "layer_02", "layer_03"]
