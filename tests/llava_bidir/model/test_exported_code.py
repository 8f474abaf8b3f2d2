"""Exports where the package is not installed: the code in the folder is all there is."""

import subprocess
import sys

import pytest
import tiny_models
import torch
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

SCRIPT = "tests/helpers/without_package.py"


@pytest.mark.slow
def test_all_ways_to_generate_without_the_package(checkpoints, tmp_path):
    """Exports, and what save_pretrained writes of a model that the package loaded, e.g. after a fine-tuning."""
    saved = tmp_path / "saved"
    AutoModelForImageTextToText.from_pretrained(checkpoints["bidirectional"]).save_pretrained(saved)
    for file in checkpoints["bidirectional"].iterdir():
        if not (saved / file.name).exists() and file.suffix != ".py":  # processor and tokenizer
            (saved / file.name).write_bytes(file.read_bytes())
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", SCRIPT, *map(str, checkpoints.values()), str(saved)]
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    run = subprocess.run(command, env=environment | {"PATH": ""}, **pipes)
    assert run.returncode == 0, run.stderr[-3000:]


def test_a_causal_export_read_by_the_stock_class_is_complete(checkpoints):
    ours = AutoModelForImageTextToText.from_pretrained(checkpoints["causal"])
    stock = LlavaForConditionalGeneration.from_pretrained(checkpoints["causal"])
    ids, _ = tiny_models.ids("tttttt")
    assert torch.equal(stock(input_ids=ids).logits, ours(input_ids=ids).logits)
