"""What choosing the best validation adds: printed, in metrics.json, and in the report beside the optimum's number."""

import json

import pandas as pd
import probe_runs
import pytest
import tiny_models
from tiny_encoders import STOCK

from probes.cli import main
from probes.fit.module import ProbeModule

SCORES = [0.5, 0.7, 0.6]  # of the validations


def test_best_last_and_their_difference_stand_beside_the_optimum(tmp_path, caplog, monkeypatch):
    scores = iter(SCORES)
    keep = ProbeModule._keep_if_best
    monkeypatch.setattr(
        ProbeModule, "_keep_if_best", lambda module, site, score: keep(module, site, next(scores))
    )
    encoder = STOCK["dinov2"].write(tmp_path / "model")
    photos = tiny_models.write_segmentation(tmp_path / "photos")
    words = ["-c", "configs/demo/probes.yaml", "--model.sites", "[final_norm]"]
    more = ["--trainer.max_epochs", "3"]
    fitted, solved = tmp_path / "study/probes", tmp_path / "study/trained"
    main(["fit", *words, *more, *probe_runs.places(encoder, photos, fitted)])
    of_solve = "--folds 2 --strengths 0.1".split()
    main(["solve", *words, *of_solve, *probe_runs.places(encoder, photos, solved)])
    (entry,) = json.loads((fitted / "metrics.json").read_text())["sites"]
    assert (entry["last"], entry["selection"]) == pytest.approx((0.6, 0.1))
    assert f"best of 3 validations {entry['miou']:.1%}, last 60.0%, difference 10.0%" in caplog.text
    main(["report", str(solved), str(fitted), "--out", str(tmp_path / "report")])
    (row,) = pd.read_csv(tmp_path / "report/selection.csv").to_dict("records")
    (optimum,) = json.loads((solved / "metrics.json").read_text())["sites"]
    numbers = [row[name] for name in ("optimum", "best", "last", "selection", "validations")]
    assert numbers == pytest.approx([optimum["miou"], entry["miou"], 0.6, 0.1, 3])
    page = (tmp_path / "report/index.html").read_text()
    assert "<th>best − last</th>" in page
    assert "<td>60</td><td>10</td>" in page
