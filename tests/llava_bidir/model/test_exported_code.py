"""Exports where the package is not installed: the code in the folder is all there is."""

import runpy
import subprocess
import sys

import pytest
import tiny_models
import torch
from processes import run_command
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from llava_bidir import IMAGE_ATTENTION
from llava_bidir.common.errors import UserError

SCRIPT = "tests/helpers/without_package.py"


@pytest.mark.slow
def test_all_ways_to_generate_without_the_package(checkpoints, tmp_path):
    """Exports, and what save_pretrained writes of a model that the package loaded, e.g. after a fine-tuning."""
    saved = tmp_path / "saved"
    AutoModelForImageTextToText.from_pretrained(checkpoints["bidirectional"]).save_pretrained(saved)
    for file in checkpoints["bidirectional"].iterdir():
        if not (saved / file.name).exists() and file.suffix != ".py":  # processor and tokenizer
            (saved / file.name).write_bytes(file.read_bytes())
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-I", SCRIPT, *map(str, checkpoints.values()), str(saved)]
    run_command(command, env=environment | {"PATH": ""}, stdin=subprocess.DEVNULL)


def test_a_causal_export_read_by_the_stock_class_is_complete(checkpoints):
    ours = AutoModelForImageTextToText.from_pretrained(checkpoints["causal"])
    stock = LlavaForConditionalGeneration.from_pretrained(checkpoints["causal"])
    ids, _ = tiny_models.ids("tttttt")
    assert torch.equal(stock(input_ids=ids).logits, ours(input_ids=ids).logits)


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
