"""Sites beside the layers of the LLM: the encoder's own layers, and parts of layers, change nothing of the others."""

import re
from pathlib import Path

import pytest
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
PARTS = {"value_01": 0.9, "attn_01": 0.3, "mlp_02": 0.35, "value_03": 0.8}  # values read best


@pytest.mark.parametrize("sites", [ENCODER | LLM, LLM | PARTS], ids=["encoder", "parts"])
def test_other_sites_change_no_best_layer_test_or_effect_and_parts_have_their_own_figure(
    sites, write, tmp_path
):
    """Also under both masks, where layers before the LLM have nothing to compare."""

    def study_of(quality):
        options = {"sites": [*quality]}
        runs = [
            write(f"{len(quality)}/run", [*quality.values()], mask=mask, options=options)
            for mask in ("causal", "bidirectional")
        ]
        return studies_of(runs)[0]

    study = study_of(sites)
    reference = study_of(LLM)
    for mask, run in study.main_runs.items():
        other = reference.main_runs[mask]
        assert run.peak_layer == other.peak_layer == "layer_02"
        assert run.layers == other.layers
        assert run.effects.keys() == other.effects.keys()
    rows = [row for row in compare_runs(*study.pairs()[0], 50) if row["of"] == "site"]
    tested = [row["site"] for row in rows if row["p"] is not None]
    assert tested == [site for site in sites if site in [*ENCODER, *LLM][:-1]]
    assert {row["site"] for row in rows} == {*sites}

    folder = Path(study.main_runs["causal"].path).parent
    main(f"report {folder} --out {tmp_path / 'report'}".split())
    assert (tmp_path / "report/parts.pdf").is_file() == (sites == LLM | PARTS)
    page = (tmp_path / "report/index.html").read_text()
    named = [name.strip() for name in re.findall(r'<th scope="row">([^<]*)<', page)]
    assert named == [site_name(site) for site in sites if site not in PARTS]
