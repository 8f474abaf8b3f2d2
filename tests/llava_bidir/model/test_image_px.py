"""`model.encoder.image_px`: another side of the encoder's square, equal to transformers' own interpolation."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import load_weights
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import ENCODERS, Encoder

PATCH_PX = 14
STORED_PX = 56


def write_encoder(name: str, folder: Path) -> Encoder:
    """Write a small random encoder of the real class, whose stored positions are a 4 x 4 grid."""
    model_class = ENCODERS[name].model_class
    config = model_class.config_class(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=PATCH_PX,
        image_size=STORED_PX,
        intermediate_size=32,
    )
    model_class(config).save_pretrained(folder / name)
    return Encoder(name, str(folder / name))


@pytest.mark.parametrize("side", [28, 70])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_states_equal_the_stock_models_interpolation(name, side, tmp_path):
    encoder = replace(write_encoder(name, tmp_path), image_px=side)
    _, llm = tiny_models.write_parts(tmp_path / "parts")
    model = build_model(encoder, llm, build_processor(encoder, llm)).eval()
    assert model.config.image_seq_length == (side // PATCH_PX) ** 2
    pixels = torch.randn(2, 3, side, side)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    stock = load_weights("encoder", encoder.entry.model_class, encoder.path).eval()
    interpolate = {"interpolate_pos_encoding": True} if name in ("clip", "siglip") else {}
    expected = stock(pixels, output_hidden_states=True, **interpolate).hidden_states[-2]
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [225, 7])
def test_a_side_that_is_no_usable_multiple_of_the_patch_is_refused(side, tmp_path):
    encoder = replace(write_encoder("dinov2", tmp_path), image_px=side)
    with pytest.raises(
        UserError, match=rf"model\.encoder\.image_px {side}: expected a multiple .*14 px"
    ):
        encoder.load_config()
