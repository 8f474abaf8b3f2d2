"""Sites beside the layers of the LLM: the encoder's own layers, and parts of layers, change nothing of the others."""

import re

import probe_runs
import pytest
import tiny_models
from report_parts import studies_of

from probes.cli import main
from probes.report.compare import compare_runs
from probes.report.words import site_name

LLM = {
    "encoder": 0.55,
    "adapter": 0.4,
    "layer_01": 0.45,
    "layer_02": 0.5,
    "layer_03": 0.42,
    "final_norm": 0.42,
}
ENCODER = {f"encoder_{i:02d}": 0.2 + 0.1 * i for i in range(4)}
PARTS = {
    "value_01": 0.9,
    "attn_01": 0.3,
    "mlp_02": 0.35,
    "value_03": 0.8,
}  # values read best
MASKS = ("causal", "bidirectional")


@pytest.mark.parametrize("sites", [ENCODER | LLM, LLM | PARTS])
def test_other_sites_change_no_best_layer_test_or_effect(sites, tmp_path):
    """Also under both masks, where layers before the LLM have nothing to compare."""
    root = tiny_models.write_segmentation(tmp_path / "data", 1, 1)

    def study_of(quality):
        runs = []
        for mask in MASKS:
            options = {
                "root": root,
                "mask": mask,
                "sites": [*quality],
            }
            path = tmp_path / f"{mask}_{len(quality)}"
            runs.append(probe_runs.write_run(path, [*quality.values()], **options))
        return studies_of(map(str, runs))[0]

    study = study_of(sites)
    reference = study_of(LLM)
    for mask, run in study.main_runs.items():
        other = reference.main_runs[mask]
        assert run.peak_layer == other.peak_layer == "layer_02"
        assert run.layers == other.layers
        assert run.effects.keys() == other.effects.keys()
    rows = [row for row in compare_runs(*study.pair(), 50) if row["of"] == "site"]
    assert [row["site"] for row in rows if row["p"] is not None] == [*LLM][:-1]
    assert {row["site"] for row in rows} == {*sites}


@pytest.mark.parametrize("sites", [ENCODER | LLM, LLM | PARTS])
def test_the_page_has_the_main_path_and_parts_in_a_figure_of_their_own(sites, tmp_path):
    root = tiny_models.write_segmentation(tmp_path / "data", 1, 1)
    probe_runs.write_run(
        tmp_path / "study/trained",
        [*sites.values()],
        root=root,
        mask="causal",
        sites=[*sites],
    )
    main(f"report {tmp_path / 'study'} --out {tmp_path / 'report'}".split())
    assert (tmp_path / "report/parts.pdf").is_file() == (sites == LLM | PARTS)
    page = (tmp_path / "report/index.html").read_text()
    named = [name.strip() for name in re.findall(r'<th scope="row">([^<]*)<', page)]
    assert named == [site_name(site) for site in sites if site not in PARTS]
