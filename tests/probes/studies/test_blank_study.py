"""`study --blank`: probes refitted on blank pictures are another arm, beside position alone and the trained model."""

import json
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from PIL import Image
from studies import study_of

from probes.runs.read import ProbeRun
from probes.studies.run import run_study

SOURCE = '''
import torch
import probes

class Places(torch.nn.Module):
    """A model whose states are the colours of patches beside their one-hot places; its layer adds nothing."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.AvgPool2d(8)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.blocks = torch.nn.ModuleList([torch.nn.Identity()])

    def forward(self, pixels):
        colours = self.stem(pixels).flatten(2).mT
        colours = colours - colours.mean(1, keepdim=True)  # nothing of a blank picture
        places = torch.eye(16).expand(len(pixels), -1, -1)
        return self.blocks[0](self.scale * torch.cat([colours, places], -1))

def build():
    return probes.EncoderModule(
        Places(), preprocess=([0.5] * 3, [0.5] * 3), patch=8, layers="blocks", image_px=32
    )
'''


def write_photos(root):
    """Write photos in which the class is a matter of place, and of colour where the place says less."""
    rng = np.random.default_rng(0)
    (root / "classes.json").parent.mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(json.dumps({"classes": ["sky", "wall", "road"]}))
    for split, count in (("training", 24), ("validation", 24)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            rows = np.arange(32)[:, None] / 32 + rng.normal(0, 0.25, (32, 1)).repeat(32, 1)
            mask = np.digitize(rows, [0.35, 0.7]).astype(np.uint8)
            photo = 60 + 50 * mask[..., None] + rng.integers(0, 20, (32, 32, 3))
            Image.fromarray(photo.astype(np.uint8)).save(root / f"images/{split}/{number:02}.png")
            Image.fromarray(mask).save(root / f"annotations/{split}/{number:02}.png")
    return root


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blank")
    (folder / "places.py").write_text(SOURCE)
    options = "--data.batch_size 8 --trainer.accelerator cpu".split()
    settings = {"arms": ("trained",), "blank": True, "only": ("solve", "position", "report")}
    source = f"{folder / 'places.py'}:build"
    data = write_photos(folder / "data")
    with redirect_stdout(StringIO()):
        run_study(study_of({"": source}, data, folder / "out", options, **settings))
    return folder / "out"


def test_on_a_model_that_adds_nothing_it_agrees_with_position_within_a_point(study):
    blank = ProbeRun(study / "blank")
    assert blank.arm == "blank"
    position = json.loads((study / "trained/position.json").read_text())["scores"]["miou"]
    for site in blank.metrics["sites"]:
        assert site["miou"] == pytest.approx(position, abs=0.01), site["site"]
    trained = ProbeRun(study / "trained").metrics["sites"]
    assert min(site["miou"] for site in trained) > position + 0.01, "the photo tells more"


def test_the_report_has_it_beside_the_trained_model_and_not_as_a_control(study):
    results = json.loads((study / "report/results.json").read_text())
    ((_, of_mask),) = results["masks"].items()
    assert of_mask["blank"]["probing"]["blank"] is True
    assert results["controls"]["random"] == {}
    page = (study / "report/index.html").read_text()
    assert "blank pictures" in page and "line dotted" in page
