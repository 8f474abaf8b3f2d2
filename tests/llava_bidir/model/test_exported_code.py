"""Exports where the package is not installed: the code in the folder is all there is."""

import runpy

import pytest
import tiny_models
import torch
import without_package
from transformers import AutoModelForImageTextToText

from llava_bidir import IMAGE_ATTENTION
from llava_bidir.common.errors import UserError


@pytest.mark.slow
def test_answers_without_the_package_are_those_with_it(checkpoints, tmp_path):
    """Of exports, and of what save_pretrained writes of a model that the package loaded, e.g. after a fine-tuning."""
    saved = tmp_path / "saved"
    AutoModelForImageTextToText.from_pretrained(checkpoints["bidirectional"]).save_pretrained(saved)
    for file in checkpoints["bidirectional"].iterdir():
        if not (saved / file.name).exists() and file.suffix != ".py":  # processor and tokenizer
            (saved / file.name).write_bytes(file.read_bytes())
    exports = [*map(str, checkpoints.values()), str(saved)]
    expected = [without_package.answers(path) for path in exports]
    assert without_package.answers_elsewhere(exports, tmp_path) == expected


def pairs(is_image):
    """Return one block per two image tokens."""
    number = is_image.cumsum(-1) - 1
    return torch.where(is_image, number.div(2, rounding_mode="floor"), -1)


def test_a_mask_that_is_registered_elsewhere_is_in_the_export(monkeypatch, tmp_path):
    monkeypatch.setitem(IMAGE_ATTENTION, "pairs", pairs)
    export = tiny_models.write_checkpoint(tmp_path / "pairs", "pairs")
    shipped = runpy.run_path(str(export / "attention.py"))["IMAGE_ATTENTION"]["pairs"]
    is_image = torch.tensor([[False, True, True, True, True, False]])
    assert shipped is not pairs
    assert torch.equal(shipped(is_image), pairs(is_image))

    monkeypatch.setitem(IMAGE_ATTENTION, "borrowed", lambda is_image: pairs(is_image))
    with pytest.raises(
        UserError, match="export: mask 'borrowed' must be a function that needs nothing but torch"
    ):
        tiny_models.write_checkpoint(tmp_path / "borrowed", "borrowed")
