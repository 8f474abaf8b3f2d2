"""Memory under load: bounds on peaks and growth, never on times. The scripts beside it run at the real sizes; here they
are smaller."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str) -> dict:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_checks_and_epoch_hold_no_record():
    """4,000 records of 1.4 KB: batches that are kept would be some 120 MB."""
    found = run("records.py", "--records", "4000", "--workers", "0", "--phases", "checks", "epoch")
    assert found["epoch"]["samples"] == 4096 and found["checks"]["findings"] == {}
    for phase in ("checks", "epoch"):
        held = found[phase]["held_mb"]
        assert held[-1] - held[0] < 40, phase


@pytest.mark.parametrize("what", ("counts", "patch labels"))
def test_large_masks_are_taken_a_few_at_a_time(what):
    """Sixteen masks of 1024 x 2048: 34 MB, and 270 MB wherever they are padded_vocab_size to 64 bits as a whole."""
    assert run("masks.py", what)["peak_mb"] < 400


def test_deep_probe_run_makes_no_logits_of_full_size():
    """34 sites and the final norm, 150 classes: logits of all pixels would be 4.1 GB, those of all tokens are 0.07 GB.
    The knockout's forward has a mask for each of 64 rows and 32 layers, 0.8 GB, and no pixels."""
    found = run("probe_run.py", "--size", "128", "256", "--images", "6", "--batch-size", "6")
    assert found["sites"] == 35 and found["all_logits_mb"] > 4000
    for step, peak in found["peak_mb"].items():
        assert peak < (1600 if step == "knockout" else 600), step


def test_page_of_a_report_does_not_grow_with_the_images():
    few, many = (run("report.py", "--images", n, "--layers", "4", "--classes", "20") for n in ("40", "1000"))
    assert many["index_html_mb"] < 1.2 * few["index_html_mb"] and many["index_html_mb"] < 3
    assert many["peak_mb"] < few["peak_mb"] + 4 * many["counts_mb"]
