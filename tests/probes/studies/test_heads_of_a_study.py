"""Heads of probes in a study: trained beside linear ones, and compared with these in the report."""

import json

import pandas as pd
import probe_runs
import pytest
from extensions import EXAMPLES, forgotten

from llava_bidir.common.errors import UserError
from llava_bidir.common.imports import take_imports
from probes import ProbeRun, Study
from probes.cli import main
from probes.studies.plan import plan

CURVES = {"probes": [0.5, 0.4, 0.5, 0.6, 0.7, 0.7], "probes_mlp": [0.6, 0.5, 0.6, 0.7, 0.9, 0.9]}


@pytest.mark.parametrize("head", ["mlp", "conv", "cosine"])
def test_another_head_is_trained_beside_linear_probes(head, settings):
    with forgotten():
        take_imports(["--import", str(EXAMPLES / "head.py")])
        steps = plan(settings(options=("--model.head", head), fit=True)).steps
    heads = {step.name: step.config.model.head for step in steps if step.kind in ("solve", "fit")}
    fitted = {step.name: step.config.trainer for step in steps if step.kind == "fit"}
    arms = ("trained", "random0", "permuted0", "adapter0", "probes")
    assert heads == dict.fromkeys(arms, "linear") | {f"probes_{head}": head}
    assert fitted["probes"] == fitted[f"probes_{head}"], "they differ in nothing else"


@pytest.mark.parametrize(
    ("head", "message"),
    [("mlp", "'mlp', but only linear probes are solved; with --fit"), ("mpl", "expected one of")],
)
def test_a_head_that_cannot_be_compared_is_said_first(head, message, settings):
    with pytest.raises(UserError, match=message):
        plan(settings(options=("--model.head", head)))


def test_the_report_compares_heads_as_it_does_models(segmentation, tmp_path, capsys):
    for name, curve in CURVES.items():
        run = probe_runs.write_run(tmp_path / name, curve, root=segmentation)
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["probe"]["head"] = "mlp" if name.endswith("mlp") else "linear"
        (run / "metrics.json").write_text(json.dumps(metrics))
    probe_runs.write_solved(tmp_path / "trained", [0.9] * 6, root=segmentation)  # linear, too
    main(["report", str(tmp_path), "--out", str(tmp_path / "report")])
    linear, mlp = (ProbeRun(tmp_path / name) for name in CURVES)
    models = pd.read_csv(tmp_path / "report/models.csv")
    assert models["name"].tolist()[1] == f"{models['name'][0]}, mlp"
    differences = pd.read_csv(tmp_path / "report/differences.csv").query("of == 'site'")
    for row in differences.itertuples():
        expected = mlp.site_scores[row.site] - linear.site_scores[row.site]
        assert row.difference == pytest.approx(expected.value) and row.difference > 0
    assert [*differences["site"]] == linear.sites
    best = max(site["miou"] for site in mlp.metrics["sites"][2:5])
    said = json.loads((tmp_path / "report/results.json").read_text())["summary"]
    assert f"mlp reads best: {100 * best:.1f}%" in said[0], "not the solved probes' 90"
    assert "random models have trained probes" in " ".join(said)
    page = (tmp_path / "report/index.html").read_text()
    assert "Only linear probes are solved: another head is trained" in page
    table = Study(tmp_path).table()
    assert {*table["probes"]} == {"solved", "trained", "trained, mlp"}
