"""Vision transformers of timm, read from folders that timm has written: states and pixels are timm's own."""

import numpy as np
import pytest
import torch
from encoder_cuts import assert_cut
from PIL import Image

import probes
from probes.models.random_weights import layer_updates

timm = pytest.importorskip("timm", reason="timm is not installed; it is the extra 'timm'")
SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3}
# side of the input and tokens before the patches, with and without registers, layer scale and rotary positions
MODELS = {
    "vit_small_patch14_dinov2": (56, 1),
    "vit_small_patch14_reg4_dinov2": (56, 5),
    "vit_small_patch16_dinov3": (64, 5),
    "vit_so400m_patch14_siglip_224": (56, 0),
    "vit_pe_core_tiny_patch16_384": (64, 1),
    "eva02_tiny_patch14_224": (56, 1),
    "deit3_small_patch16_224": (80, 1),
}


def write(name: str, folder) -> tuple[torch.nn.Module, str]:
    """Return a small random model of timm, and the name of its folder as a model."""
    side, _ = MODELS[name]
    torch.manual_seed(0)
    shape = {"input_size": (3, side, side)}
    model = timm.create_model(name, pretrained_cfg_overlay=shape, img_size=side, **SMALL)
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1 or "ls" in key or "gamma" in key:
            parameter.data += 0.1 * torch.rand_like(parameter)
    arguments = SMALL | {"img_size": side}
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model.eval(), f"timm:local-dir:{folder}"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_states_and_pixels_are_those_of_timm(name, tmp_path):
    model, path = write(name, tmp_path)
    encoder = probes.load(path, device="cpu")
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    photo = Image.fromarray(noise)
    settings = timm.data.resolve_model_data_config(model)
    pixels = timm.data.create_transform(**settings)(photo)[None]
    torch.testing.assert_close(encoder.preprocess(photo), pixels)
    hidden = model.forward_intermediates(
        pixels, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    _, extra = MODELS[name]
    assert encoder.model.config.extra_tokens == extra and len(hidden) == 3
    states = encoder.states(pixels)
    for i, of_layer in enumerate(hidden, 1):
        patches = of_layer[0] if isinstance(of_layer, tuple) else of_layer
        torch.testing.assert_close(states[f"layer_{i:02d}"], patches, rtol=1e-5, atol=1e-5)
    updates = layer_updates(encoder, pixels)
    control = {"untrained": ["encoder"], "match": "update", "match_images": [photo]}
    random = probes.load(path, device="cpu", **control)
    assert layer_updates(random, pixels) == pytest.approx(updates, rel=2e-3)
    for keep_extra in (True, False):
        assert_cut(encoder, pixels, layers=[2], keep_extra=keep_extra)
