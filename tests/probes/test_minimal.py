"""The measurement in one file gives the numbers of `probes solve`."""

import pytest
from probe_runs import places

from probes import minimal
from probes.cli import main
from probes.runs.read import ProbeRun

DRAWS_PICTURES = True


@pytest.mark.numerics
def test_scores_are_those_of_solve_at_the_same_strength(
    checkpoints, segmentation, tmp_path, capsys
):
    strength = "3e-2"
    solve = ["solve", "-c", "configs/demo/probes.yaml", "--strengths", strength]
    main([*solve, *places(checkpoints["causal"], segmentation, tmp_path / "run")])
    capsys.readouterr()
    sites = ProbeRun(tmp_path / "run").metrics["sites"]
    solved = {row["site"]: row["miou"] for row in sites}

    model = str(checkpoints["causal"])
    picture = tmp_path / "curve.png"
    minimal.main(model, data=str(segmentation), strength=float(strength), out=str(picture))
    lines = capsys.readouterr().out.splitlines()
    printed_scores = {
        site: float(percent) / 100 for site, percent in (line.split() for line in lines[:-1])
    }

    assert printed_scores == pytest.approx(solved, abs=1e-3)
    assert picture.stat().st_size > 1000
