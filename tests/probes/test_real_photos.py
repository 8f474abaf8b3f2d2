"""Probes on real photographs, in the layout of the toy world; collected where LLAVA_BIDIR_TEST_DATA is set."""

import os
from pathlib import Path

import probe_runs
import pytest
import reference
from PIL import Image

from probes.cli import main

CAMVID = Path(os.environ["LLAVA_BIDIR_TEST_DATA"]) / "camvid"


@pytest.mark.slow
def test_probes_on_photos_score_as_numpy_does_and_make_a_report(checkpoints, tmp_path):
    more = ["--data.name", "camvid", "--data.cache_features", "true", "--save_predictions", "true"]
    run = probe_runs.fit(checkpoints["bidirectional"], CAMVID, tmp_path, *more)
    targets = probe_runs.read_masks(CAMVID / "annotations/validation")
    assert run.metrics["images"] == len(targets) == 51
    assert len(run.metrics["classes"]) == 11
    for site in run.metrics["sites"]:
        predictions = probe_runs.read_masks(tmp_path / "predictions" / site["site"])
        miou, pacc, iou = reference.scores(predictions, targets, 11)
        assert site["miou"] == pytest.approx(miou)
        assert site["pacc"] == pytest.approx(pacc)
        assert site["iou_per_class"] == [None if x is None else pytest.approx(x) for x in iou]
    photos = sorted((CAMVID / "images/validation").iterdir())[:2]
    main(
        [
            "segment",
            "--probes",
            str(tmp_path),
            *map(str, photos),
            "--out",
            str(tmp_path / "segment"),
        ]
    )
    for photo in photos:
        assert (
            Image.open(tmp_path / f"segment/{photo.stem}_overlay.png").size
            == Image.open(photo).size
        )
    main(["maps", "--probes", str(tmp_path), "--image", "0", "25"])
    main(["report", str(tmp_path), "--out", str(tmp_path / "report")])
    assert (tmp_path / "report/index.html").stat().st_size > 50_000
