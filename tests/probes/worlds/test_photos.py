"""Records of `probes real --photos`: captions once per photo, questions of all data sets, paths behind links."""

import json
from pathlib import Path

import pytest
import tiny_models
from PIL import Image

from llava_bidir.common.errors import UserError
from llava_bidir.data.instruction_dataset import Instructions
from probes.worlds.photos import write_photos

PHOTOS = 8
CAPTIONS = 3  # of each photo


def write_set(root: Path, seed: int) -> Path:
    return tiny_models.write_segmentation(root, PHOTOS, PHOTOS, seed=seed)


@pytest.fixture
def sets(tmp_path) -> list[Path]:
    return [write_set(tmp_path / name, seed) for seed, name in enumerate(("streets", "fields"))]


@pytest.fixture
def captions(tmp_path) -> Path:
    """LLaVA's JSON with three captions of each of 40 photos, which are in a folder elsewhere."""
    images = tmp_path / "elsewhere/images"
    images.mkdir(parents=True)
    records = []
    for i in range(40):
        Image.new("RGB", (4, 4)).save(images / f"{i}.png")
        for k in range(CAPTIONS):
            turns = tiny_models.turns("<image>\nDescribe the picture.", f"Caption {k} of {i}.")
            record = {"id": f"{i}_{k}", "image": f"images/{i}.png"}
            records.append(record | {"conversations": turns})
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(records))
    return file


def read(out: Path, name: str) -> list[dict]:
    return json.loads((out / f"{name}.json").read_text())


def test_stage_1_has_one_caption_of_each_photo_and_stage_2_others_beside_the_questions(
    sets, captions, tmp_path
):
    out = tmp_path / "out"
    elsewhere = tmp_path / "elsewhere"
    write_photos(out, sets, captions, elsewhere, seed=0, held_out=12)
    first = read(out, "captions")
    assert sorted(record["image"] for record in first) == sorted(
        f"captions/images/{i}.png" for i in range(40)
    )
    mixed = read(out, "dialogues")
    asked = [record for record in mixed if not record["image"].startswith("captions/")]
    assert {record["image"].split("/")[0] for record in asked} == {"streets", "fields"}
    assert len(mixed) == 2 * len(asked)
    ids = [record["id"] for record in first + mixed]
    assert len(set(ids)) == len(ids), "no caption is in both stages"
    for name in ("captions", "dialogues", "questions"):
        loaded = Instructions(out / f"{name}.json", out, follow_links=True)
        sizes = {loaded[i]["image"].size for i in range(len(loaded))}
        assert sizes <= {(4, 4), (20, 24)}


def test_held_out_questions_are_about_validation_photos_of_each_set(sets, tmp_path):
    out = tmp_path / "out"
    write_photos(out, sets, None, None, seed=0, held_out=12)
    by_set = [read(out, "streets"), read(out, "fields")]
    assert [len(records) for records in by_set] == [12, 12]
    assert read(out, "questions") == by_set[0] + by_set[1]
    assert all("/images/validation/" in record["image"] for record in read(out, "questions"))
    assert all("/images/training/" in record["image"] for record in read(out, "captions"))


@pytest.mark.parametrize("name", ["streets", "questions"])
def test_two_sets_of_one_name_are_an_error(name, sets, tmp_path):
    other = write_set(tmp_path / "more" / name, 2)
    with pytest.raises(UserError, match="expected different names"):
        write_photos(tmp_path / "out", [*sets, other], None, None, seed=0, held_out=4)
