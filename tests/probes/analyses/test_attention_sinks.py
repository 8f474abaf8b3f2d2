"""Attention sinks among image tokens: measured on models in which the first one is made one, or not, and told."""

import json
import shutil

import probe_runs
import pytest
from report_parts import studies_of

from probes.analyses.routes.routes_section import section as route_section
from probes.analyses.sinks import (
    SINK_NORM,
    describe_sinks,
    layers_with_sinks,
    measure_sinks,
    meets_sink,
)
from probes.analyses.starvation import sink_warning
from probes.cli import main
from probes.report.claims import evaluate_claims
from probes.runs.read import ProbeRun


def with_sink(mllm, layer: int):
    """Add a large vector to the first image token after a layer, as a sink has it."""
    first = mllm.image_positions[0]

    def add(module, args, output):
        output = output.clone()
        output[:, first, 3] += 1e5
        return output

    mllm.layers[layer - 1].register_forward_hook(add)
    return mllm


def test_a_planted_sink_is_found_from_its_layer_on(runs):
    run = runs["causal"]
    images = [sample["image"] for sample in run.dataset()][:3]
    plain = measure_sinks(run.mllm(), images)
    assert [layer["site"] for layer in plain["layers"]] == ["layer_01", "layer_02", "layer_03"]
    assert all(layer["first_norm"] < SINK_NORM for layer in plain["layers"])
    planted = measure_sinks(with_sink(run.mllm(), 2), images)
    assert planted["layers"][0] == plain["layers"][0]
    for layer in planted["layers"][1:]:
        assert layer["first_norm"] > 100
        assert layer["sinks"] == 1


@pytest.mark.parametrize(
    ("norms", "counts", "layers"),
    [
        ([1.0, 1.0, 1.0], [0, 0, 0], set()),
        ([1.0, 50.0, 50.0], [0, 1, 1], {3}),
        ([50.0, 1.0, 1.0], [1, 0.9, 0], {2}),
        ([1.0, 1.0, 50.0], [1.5, 0, 1], {2}),
    ],
)
def test_a_window_meets_the_sinks_that_the_layer_before_has_written(norms, counts, layers):
    names = ("layer_01", "layer_02", "layer_03")
    rows = zip(names, norms, counts, strict=True)
    keys = ("site", "first_norm", "sinks")
    measured = {"images": 8, "layers": [dict(zip(keys, row, strict=True)) for row in rows]}
    assert layers_with_sinks(measured) == sorted(layers)
    for window in ({1}, {2}, {3}, {1, 2, 3}):
        assert meets_sink(window, measured) == bool(window & layers)
        assert bool(describe_sinks("causal", measured, window)) == bool(window & layers)


def test_routes_through_a_sink_are_marked_in_table_and_page(runs, tmp_path, monkeypatch):
    """The first image token is a sink from layer 1 on."""
    model = ProbeRun.mllm
    monkeypatch.setattr(ProbeRun, "mllm", lambda run: with_sink(model(run), 1))
    run = shutil.copytree(runs["causal"].path, tmp_path / "run")
    questions = probe_runs.write_questions(runs["causal"], tmp_path)
    words = ["--probes", str(run)]
    main(["sinks", *words])
    main(["routes", *words, "--questions", str(questions), "--draws", "1", "--window", "1"])
    (study,) = studies_of([run])
    content = route_section(study)
    said = "Causal: in 2 layers from 2 to 3, image tokens attend to attention sinks among them"
    assert any(text.startswith(said) for text in content.sentences)
    (figure,) = content.figures
    assert "Grey ground: layers in which" in figure.caption
    for row in figure.rows:
        assert row["can_cut_sink"] == (row["layers"] in ("all", "2-2", "3-3"))


@pytest.mark.parametrize("norm", [9.9, 159.0])
def test_the_rest_of_the_row_is_judged_where_there_is_a_sink(runs, norm, tmp_path):
    names = ("causal", "bidirectional")
    paths = [shutil.copytree(runs[mask].path, tmp_path / mask) for mask in names]
    pair = {mask: ProbeRun(path) for mask, path in zip(names, paths, strict=True)}
    causal = pair["causal"]
    site = causal.peak_layer
    layers = [{"site": site, "first_norm": norm, "sinks": 1.0}]
    measured = {"runs": [causal.fingerprint], "images": 8, "layers": layers}
    (causal.path / "sinks.json").write_text(json.dumps(measured))
    claims = evaluate_claims(*studies_of(paths))
    warning = sink_warning(pair, site)
    sink_claims = [claim for claim in claims if claim["claim"] == "starvation_without_sink"]
    if norm < SINK_NORM:
        assert not (sink_claims or warning)
        return
    rest = slice(1, causal.metrics["grid"][1])
    right = [run.counts.patch_right[run.sites.index(site)][:, rest].sum() for run in pair.values()]
    gap = (right[1] - right[0]).item() / causal.counts.patch_valid[:, rest].sum().item()
    assert sink_claims[0]["value"] == pytest.approx(gap)
    assert f"attention sink at {site}: its norm is 159 times" in warning
