"""Images that stand in training and in validation are found by content, and named."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llava_bidir.data.datamodule import InstructionData
from llava_bidir.data.shared_images import describe_shared, shared_images


@pytest.fixture
def folder(tmp_path):
    """Eight images of equal size in bytes, and copies of two of them under other names."""
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (9, 7, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.bmp")
    (tmp_path / "copy.bmp").write_bytes((tmp_path / "1.bmp").read_bytes())
    (tmp_path / "other.bmp").write_bytes((tmp_path / "7.bmp").read_bytes())
    return tmp_path


TRAINED = [f"{i}.bmp" for i in range(5)]
ASKED = ["4.bmp", "5.bmp", "6.bmp", "copy.bmp", "other.bmp", "missing.bmp"]


def test_equal_images_are_found_under_any_name_and_no_others(folder):
    expected = {"4.bmp": "4.bmp", "copy.bmp": "1.bmp"}
    assert shared_images(TRAINED, ASKED, folder) == expected
    sentence = describe_shared(expected, len(ASKED))
    assert sentence.startswith("2 of 6 images of data.val_annotations are training images, too: ")
    assert "4.bmp, copy.bmp (as 1.bmp)." in sentence
    assert shared_images(TRAINED, ["5.bmp"], folder) == {}
    assert describe_shared({}, 3) == ""


def test_fit_warns_of_images_that_are_trained_on_and_records_them(conversations):
    """test_cli.py has the record in the export."""
    records = str(conversations / "data.json")
    data = InstructionData(records, str(conversations), records, batch_size=4, micro_batch_size=4)
    data.trainer = SimpleNamespace(
        is_global_zero=True,
        global_rank=0,
        world_size=1,
        log_every_n_steps=1,
        accumulate_grad_batches=1,
        limit_train_batches=1.0,
        strategy=None,
    )
    message = "10 of 10 images of data.val_annotations are training images, too: "
    with pytest.warns(UserWarning, match=message):
        data.setup("fit")
