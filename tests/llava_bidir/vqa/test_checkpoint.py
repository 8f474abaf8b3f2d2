"""What is read of a checkpoint before anything runs."""

import json
import shutil

import pytest

from llava_bidir.vqa.checkpoint import encoder, fingerprint, image_attention, local


def rewritten(source, folder, **changes):
    """A copy of a checkpoint with other entries in its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("mask", ["causal", "bidirectional", "prefix"])
def test_mask_and_encoder_are_those_of_the_config(mask, checkpoints):
    assert image_attention(checkpoints[mask]) == mask and encoder(checkpoints[mask]) == "clip"


def test_stock_llava_with_a_mask_is_refused(checkpoints, tmp_path):
    """transformers would load it, keep the key, and drop the mask without a word."""
    stock = rewritten(checkpoints["bidirectional"], tmp_path / "stock", model_type="llava")
    with pytest.raises(ValueError, match="image_attention 'bidirectional' would silently run causally; export it with"):
        image_attention(stock)
    assert image_attention(rewritten(checkpoints["causal"], tmp_path / "causal", model_type="llava")) == "causal"


def test_other_models_are_refused(checkpoints, tmp_path):
    other = rewritten(checkpoints["causal"], tmp_path / "other", model_type="qwen2_vl")
    with pytest.raises(ValueError, match="model_type 'qwen2_vl'; there is llava_bidir and llava"):
        image_attention(other)
    with pytest.raises(ValueError, match="neither a checkpoint directory nor a model that the hub or its cache has"):
        local("nobody/nothing")


def test_fingerprint_changes_with_a_single_byte_of_the_weights(checkpoints, tmp_path):
    copied = shutil.copytree(checkpoints["causal"], tmp_path / "copy")
    before = fingerprint(copied)
    assert before == fingerprint(checkpoints["causal"]) != fingerprint(checkpoints["bidirectional"])
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    assert fingerprint(copied) != before
