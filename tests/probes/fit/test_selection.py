"""What choosing the best validation adds: printed, in metrics.json, and in the report beside the optimum's number."""

import json

import pandas as pd
import probe_runs
import pytest
import tiny_models
from tiny_encoders import STOCK

from probes.cli import main


def test_best_last_and_their_difference_stand_beside_the_optimum(tmp_path, capsys):
    encoder = STOCK["dinov2"].write(tmp_path / "model")
    photos = tiny_models.write_segmentation(tmp_path / "photos")
    words = ["-c", "configs/demo/probes.yaml", "--model.sites", "[final_norm]"]
    more = "--trainer.max_epochs 8 --model.learning_rate 30 --trainer.check_val_every_n_epoch 1".split()
    fitted, solved = tmp_path / "study/probes", tmp_path / "study/trained"
    main(["fit", *words, *more, *probe_runs.places(encoder, photos, fitted)])
    printed = capsys.readouterr().err
    main(
        [
            "solve",
            *words,
            "--folds",
            "2",
            "--strengths",
            "0.1",
            *probe_runs.places(encoder, photos, solved),
        ]
    )
    (entry,) = json.loads((fitted / "metrics.json").read_text())["sites"]
    assert entry["last"] == entry["history"][-1]
    assert entry["selection"] == pytest.approx(max(entry["history"]) - entry["history"][-1])
    assert entry["selection"] > 0, "else the test sees nothing"
    best, last, added = (f"{entry[key]:.1%}" for key in ("miou", "last", "selection"))
    assert f"final_norm: best of 8 validations {best}, last {last}, difference {added}" in printed
    main(["report", str(solved), str(fitted), "--out", str(tmp_path / "report")])
    (row,) = pd.read_csv(tmp_path / "report/selection.csv").to_dict("records")
    (optimum,) = json.loads((solved / "metrics.json").read_text())["sites"]
    assert row["optimum"] == pytest.approx(optimum["miou"])
    assert (row["best"], row["last"]) == pytest.approx((entry["miou"], entry["last"]))
    page = (tmp_path / "report/index.html").read_text()
    assert "<th>best − last</th>" in page
    assert f"<td>{100 * entry['selection']:.3g}</td>" in page
