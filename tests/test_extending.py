"""The files of `extending/`, which READMEs show as they are; analysis and task have tests beside those of ours."""

import re
import runpy
import shutil

import numpy as np
import pytest
import torch
from dataset_layouts import labels, photo, save
from extensions import EXAMPLES, forgotten
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_families import build, write

import probes
from llava_bidir import IMAGE_ATTENTION
from llava_bidir.common.imports import take_imports
from probes.data.registry import open_dataset
from probes.heads import Probe
from probes.models.families import FAMILIES
from probes.models.random_weights import layer_updates

FILES = sorted(EXAMPLES.glob("*.py"))
ROOT = EXAMPLES.parents[1]
MOST_LINES = 25


@pytest.fixture
def own():
    """A function that imports files by name, until the test ends."""
    with forgotten():
        yield lambda name: take_imports(["--import", str(EXAMPLES / f"{name}.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_one_page_shows_the_file_as_it_is_and_contributing_leads_there(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (page,) = re.findall(rf"\[{file.name}\]\(([\w/.]+)#[\w-]+\)", guide)
    assert f"```python\n{text}```" in (ROOT / page).read_text(encoding="utf-8")


@given(st.lists(st.booleans(), min_size=2, max_size=9))
def test_tokens_of_an_image_see_each_other_and_no_other_image(is_image):
    with forgotten():
        take_imports(["--import", str(EXAMPLES / "mask.py")])
        (ids,) = IMAGE_ATTENTION["per_image"](torch.tensor([is_image])).tolist()
    for first in range(len(is_image)):
        for second in range(first + 1, len(is_image)):
            together = ids[first] == ids[second] >= 0
            assert together == all(is_image[first : second + 1])


def test_one_image_under_the_mask_has_the_states_of_bidirectional_attention(own, checkpoints):
    own("mask")
    photo = Image.effect_noise((40, 30), 80).convert("RGB")
    states = {}
    for mask in ("per_image", "bidirectional", "causal"):
        mllm = probes.load(checkpoints["causal"], image_attention=mask, device="cpu")
        states[mask] = mllm(mllm.preprocess(photo))["layer_03"]
    assert torch.equal(states["per_image"], states["bidirectional"])
    assert not torch.allclose(states["per_image"], states["causal"])


def test_a_head_of_cosines_ignores_the_norm_of_a_state(own):
    own("head")
    probe = Probe(5, 3, (2, 3), head="cosine")
    states = torch.randn(2, 6, 5)
    torch.testing.assert_close(probe(3 * states), probe(states))
    assert probe(states).abs().max() <= 10


def test_camvid_has_11_classes_and_ignores_the_twelfth_label(own, tmp_path):
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        for i in range(count):
            save(tmp_path / part / f"{i}.png", photo(i))
            save(tmp_path / f"{part}annot/{i}.png", labels(i, range(12)))
    own("dataset")

    def opened(split, **options):
        return open_dataset("camvid", root=str(tmp_path), split=split, options=options)

    data = opened("validation")
    assert (len(opened("training")), len(data)) == (3, 1)
    assert len(opened("validation", scored_on="test")) == 2
    raw = np.asarray(Image.open(tmp_path / "valannot/0.png"))
    assert data.classes[4] == "pavement" and 11 in raw
    assert (data[0]["target"] == np.where(raw == 11, 255, raw)).all()


def test_the_states_of_an_own_encoder_are_those_of_its_forward():
    path = f"{EXAMPLES / 'encoder.py'}:build"
    encoder = probes.load(path, device="cpu")
    image = Image.effect_noise((48, 40), 80).convert("RGB")
    pixels = encoder.preprocess(image)
    states = encoder.states(pixels)
    with torch.no_grad():
        expected = runpy.run_path(str(EXAMPLES / "encoder.py"))["build"]().module.eval()(pixels)
    torch.testing.assert_close(states["layer_04"], expected)
    assert encoder.grid == (4, 4) and [*states][:2] == ["layer_00", "layer_01"]
    control = {"untrained": ["encoder"], "match": "update", "match_images": [image]}
    random = probes.load(path, device="cpu", **control)
    updates = layer_updates(encoder, pixels)
    assert layer_updates(random, pixels) == pytest.approx(updates, rel=2e-3)


def test_an_own_family_reads_what_llava_reads(own, tmp_path):
    llava = write("llava", tmp_path / "llava")
    mine = shutil.copytree(llava, tmp_path / "mine")
    stock = build("llava")
    own("family")
    mine_class = FAMILIES["mine"].model_cls
    settings = stock.config.to_dict() | {"model_type": "mine"}
    model = mine_class(mine_class.config_class(**settings))
    model.load_state_dict(stock.state_dict())
    model.save_pretrained(mine)
    encoder = probes.load(mine, device="cpu")
    pixels = encoder.preprocess(Image.effect_noise((40, 30), 80).convert("RGB"))
    expected = probes.load(llava, device="cpu")(pixels)
    for site, states in encoder(pixels).items():
        assert torch.equal(states, expected[site]), site
