"""Reports of runs with parts of layers: rows and a figure of their own, and nothing else changes."""

import json

import probe_runs
import pytest
import tiny_models

from probes.cli import main
from probes.report.figures.layer_curves import layer_curves, stack_figures
from probes.report.figures.layer_parts import part_curves, part_figures
from probes.report.site_table import name_site, name_sites, site_rows
from probes.results.study import read_studies

PLAIN = [
    "encoder",
    "adapter",
    "layer_01",
    "layer_02",
    "layer_03",
    "final_norm",
]
QUALITY = dict(
    zip(
        PLAIN,
        [
            0.55,
            0.4,
            0.45,
            0.5,
            0.42,
            0.42,
        ],
        strict=True,
    )
)
MORE = {
    "value_01": 0.9,
    "attn_01": 0.3,
    "mlp_02": 0.35,
    "value_03": 0.8,
}
MASKS = ("causal", "bidirectional")


@pytest.fixture
def write(tmp_path):
    root = tiny_models.write_segmentation(tmp_path / "data", 1, 1)

    def write(mask: str, **more: float) -> str:
        quality = QUALITY | more
        out = tmp_path / f"{mask}_{len(quality)}"
        values = [*quality.values()]
        sites = [*quality]
        return str(
            probe_runs.write_run(
                out,
                values,
                root=root,
                mask=mask,
                sites=sites,
            )
        )

    return write


def xs(axes) -> list[list[float]]:
    """Return the positions of the curves, without marks of one layer."""
    return [[*line.get_xdata()] for line in axes.lines if len(line.get_xdata()) > 2]


def test_curves_best_layers_tests_and_effects_are_those_without_parts(write, tmp_path):
    """Although parts read best."""
    (study,) = read_studies([write(mask, **MORE) for mask in MASKS])
    (reference,) = read_studies([write(mask) for mask in MASKS])
    for mask in MASKS:
        run = study.main_runs[mask]
        assert run.peak_layer == "layer_02" == reference.main_runs[mask].peak_layer
        assert run.layers == reference.main_runs[mask].layers
        assert run.effects.keys() == reference.main_runs[mask].effects.keys()
    curves = layer_curves(study, False).figure.axes[0]
    assert xs(curves) == xs(layer_curves(reference, False).figure.axes[0])
    assert not [*stack_figures(study)]
    main(["report", *(str(run.path) for run in study.members), "--out", str(tmp_path / "report")])
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert [entry["site"] for entry in results["paired"]["sites"]] == PLAIN[:-1]
    assert {row["site"] for row in results["sites"]} == {*PLAIN, *MORE}
    page = (tmp_path / "report/index.html").read_text()
    assert "Best at the values of layer 1 under causal attention" in page
    assert (tmp_path / "report/parts.csv").is_file()


def test_the_figure_of_parts_has_each_at_its_layer(write):
    (study,) = read_studies([write("causal", **MORE)])
    figure, rows = part_curves(study.main_runs)
    (axes,) = figure.axes
    scores = {entry["site"]: entry["miou"] for entry in study.first.metrics["sites"]}
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    expected = {
        "values": [[1, scores["value_01"]], [3, scores["value_03"]]],
        "added by attention": [[1, scores["attn_01"]]],
        "added by the MLP": [[2, scores["mlp_02"]]],
        "output of the layer": [[i, scores[f"layer_0{i}"]] for i in (1, 2, 3)],
    }
    assert drawn.keys() == expected.keys()
    for name, points in expected.items():
        assert drawn[name] == [[x, pytest.approx(100 * y)] for x, y in points]
    assert len(rows) == len(PLAIN) + len(MORE)
    (reference,) = read_studies([write("causal")])
    assert not [*part_figures(reference)] and len([*part_figures(study)]) == 1


def test_random_llms_are_compared_at_parts(write, tmp_path):
    path = write("causal", **MORE)
    out = tmp_path / "random"
    quality = {site: 0.2 for site in (*PLAIN[1:], *MORE)}
    root = tmp_path / "data"
    probe_runs.write_run(
        out,
        [*quality.values()],
        root=root,
        mask="causal",
        sites=[*quality],
    )
    file = out / "metrics.json"
    control = {
        "untrained": ["llm"],
        "match": "update",
        "draw": 0,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | control))
    (study,) = read_studies([path, str(out)])
    compared = {row["site"]: row["draws"] for row in site_rows(study)}
    none = {
        "encoder": 0,
        "adapter": 0,
    }
    assert compared == dict.fromkeys((*PLAIN, *MORE), 1) | none


def test_names_in_sentences():
    assert name_site("value_07") == "the values of layer 7"
    assert name_site("attn_10") == "the attention output of layer 10"
    assert name_site("encoder_04") == "the encoder's layer 4"
    sites = [
        "layer_01",
        "value_02",
        "layer_02",
        "layer_03",
    ]
    expected = "layers 1 to 3 and the values of layer 2"
    assert name_sites(sites) == expected
