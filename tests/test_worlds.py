"""`make demo WORLD=context`: the demo in the world of one scene in a picture, with tasks of its own."""

import json
import sys
from pathlib import Path

import pytest
from processes import HANGING_S, run_command

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.nightly


def test_the_demo_of_the_context_world_ends_with_a_report_of_both_masks(tmp_path):
    out = tmp_path / "demo"
    # with this environment, which make shall not install anew
    environment = ["-o", ".venv/installed", f"PY={sys.executable}"]
    words = ["make", *environment, "demo", "WORLD=context", "SCALE=0.01", f"OUT={out}"]
    run_command(words, cwd=ROOT, timeout=2 * HANGING_S)
    assert json.loads((out / "settings.json").read_text())["world"] == "context"
    assert (out / "assets/segmentation/targets.json").is_file(), "depth, normals and boundaries"
    found = json.loads((out / "report/results.json").read_text())
    studies = [study for study in found.get("studies", [found]) if len(study["masks"]) == 2]
    assert studies
    assert set(studies[0]["masks"]) == {"causal", "bidirectional"}
    for mask in ("causal", "bidirectional"):
        training = json.loads((out / mask / "stage2/hf/training.json").read_text())
        assert training["val/answer_accuracy"] is not None
