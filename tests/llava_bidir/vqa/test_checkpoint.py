"""The mask, encoder and fingerprint of a checkpoint."""

import json
import shutil

import pytest

from llava_bidir.vqa.checkpoint import (
    fingerprint,
    read_encoder_name,
    read_image_attention,
    resolve_checkpoint,
)


def copy_with_config(source, folder, **changes):
    """Copy a checkpoint and change its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("mask", ["causal", "bidirectional", "prefix"])
def test_mask_and_encoder_are_those_of_the_config(mask, checkpoints):
    assert read_image_attention(checkpoints[mask]) == mask
    assert read_encoder_name(checkpoints[mask]) == "clip"


def test_stock_llava_with_a_mask_is_rejected(checkpoints, tmp_path):
    """Transformers would load it, keep the key and silently ignore the mask."""
    stock = copy_with_config(checkpoints["bidirectional"], tmp_path / "stock", model_type="llava")
    with pytest.raises(
        ValueError,
        match="image_attention 'bidirectional' would silently run causally; export it with",
    ):
        read_image_attention(stock)
    assert (
        read_image_attention(
            copy_with_config(checkpoints["causal"], tmp_path / "causal", model_type="llava")
        )
        == "causal"
    )


def test_other_models_are_rejected(checkpoints, tmp_path):
    other = copy_with_config(checkpoints["causal"], tmp_path / "other", model_type="qwen2_vl")
    with pytest.raises(
        ValueError, match="model_type 'qwen2_vl' is not supported; expected llava_bidir or llava"
    ):
        read_image_attention(other)
    with pytest.raises(
        ValueError, match="neither a checkpoint directory nor a model on the hub or in its cache"
    ):
        resolve_checkpoint("nobody/nothing")


def test_fingerprint_changes_with_a_single_byte_of_the_weights(checkpoints, tmp_path):
    copied = shutil.copytree(checkpoints["causal"], tmp_path / "copy")
    before = fingerprint(copied)
    assert before == fingerprint(checkpoints["causal"]) != fingerprint(checkpoints["bidirectional"])
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    assert fingerprint(copied) != before
