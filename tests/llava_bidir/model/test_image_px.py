"""`model.encoder.image_px`: another side of the encoder's square, equal to transformers' own interpolation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import load_weights
from llava_bidir.model.encoders import ENCODERS, Encoder

# what the tests ask for, since interpolation in float32 would hide a difference
pytestmark = pytest.mark.filterwarnings("ignore:.*computed in float64")

PATCH_PX = 14
STORED_PX = 56


def write_encoder(name: str, folder: Path) -> Encoder:
    """Write a small random encoder of the real class, whose stored positions are a 4 x 4 grid."""
    entry = ENCODERS[name]
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": PATCH_PX,
        "image_size": STORED_PX,
        "intermediate_size": 32,
    }
    if entry.extra_tokens > 1:
        settings["num_register_tokens"] = entry.extra_tokens - 1
    torch.manual_seed(0)
    entry.model_class(entry.config_class(**settings)).save_pretrained(folder / name)
    return Encoder(name, str(folder / name))


def stock_patches(encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
    """Return hidden states of the patches from the stock model, which interpolates its positions in each forward."""
    tower = load_weights(
        "encoder", encoder.entry.model_class, encoder.path, dtype=torch.float64
    ).eval()
    interpolate = {"interpolate_pos_encoding": True} if encoder.name in ("clip", "siglip") else {}
    states = tower(pixels, output_hidden_states=True, **interpolate).hidden_states[-2]
    return states[:, encoder.entry.extra_tokens :]


@pytest.mark.parametrize("side", [28, 70])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_states_equal_the_stock_models_interpolation(name, side, tmp_path):
    encoder = replace(write_encoder(name, tmp_path), image_px=side)
    pixels = torch.randn(
        2,
        3,
        side,
        side,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
    )
    tower = encoder.load_tower(dtype=torch.float64).eval()
    states = tower(pixels, output_hidden_states=True).hidden_states[-2][
        :, encoder.entry.extra_tokens :
    ]
    assert states.shape[1] == (side // PATCH_PX) ** 2
    torch.testing.assert_close(states, stock_patches(encoder, pixels), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [225, 7])
def test_a_side_that_is_no_usable_multiple_of_the_patch_is_refused(side, tmp_path):
    encoder = replace(write_encoder("dinov2", tmp_path), image_px=side)
    with pytest.raises(
        UserError, match=rf"model\.encoder\.image_px {side}: expected a multiple .*14 px"
    ):
        encoder.load_config()
