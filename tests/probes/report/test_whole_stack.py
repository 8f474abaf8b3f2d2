"""Sites beside the layers of the LLM: the encoder's own layers, and parts of layers, change nothing of the others."""

import probe_runs
import pytest
import tiny_models
from report_parts import studies_of

from probes.report.compare import compare_runs
from probes.report.figures.layer_curves import layer_curves, stack_figures
from probes.report.figures.layer_parts import part_figures

LLM = {
    "encoder": 0.55,
    "adapter": 0.4,
    "layer_01": 0.45,
    "layer_02": 0.5,
    "layer_03": 0.42,
    "final_norm": 0.42,
}
ENCODER = {f"encoder_{i:02d}": 0.2 + 0.1 * i for i in range(4)}
PARTS = {"value_01": 0.9, "attn_01": 0.3, "mlp_02": 0.35, "value_03": 0.8}  # values read best
MASKS = ("causal", "bidirectional")


@pytest.mark.parametrize(("sites", "drawn"), [(ENCODER | LLM, (1, 0)), (LLM | PARTS, (0, 1))])
def test_other_sites_change_no_curve_best_layer_test_or_effect(sites, drawn, tmp_path):
    """Also under both masks, where layers before the LLM have nothing to compare."""
    root = tiny_models.write_segmentation(tmp_path / "data", 1, 1)

    def study_of(quality):
        runs = []
        for mask in MASKS:
            options = {"root": root, "mask": mask, "sites": [*quality]}
            path = tmp_path / f"{mask}_{len(quality)}"
            runs.append(probe_runs.write_run(path, [*quality.values()], **options))
        return studies_of(map(str, runs))[0]

    def curves(study):
        (axes,) = layer_curves(study, False).figure.axes
        return [[*line.get_xdata()] for line in axes.lines if len(line.get_xdata()) > 2]

    study = study_of(sites)
    reference = study_of(LLM)
    for mask, run in study.main_runs.items():
        other = reference.main_runs[mask]
        assert run.peak_layer == other.peak_layer == "layer_02"
        assert run.layers == other.layers
        assert run.effects.keys() == other.effects.keys()
    assert curves(study) == curves(reference) == [[-1, 0, 1, 2, 3]] * 2
    assert (len([*stack_figures(study)]), len([*part_figures(study)])) == drawn
    assert not [*stack_figures(reference), *part_figures(reference)]
    rows = [row for row in compare_runs(*study.pair(), 50) if row["of"] == "site"]
    assert [row["site"] for row in rows if row["p"] is not None] == [*LLM][:-1]
    assert {row["site"] for row in rows} == {*sites}
