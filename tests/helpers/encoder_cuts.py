"""Which tokens of an encoder see which under a knockout, measured by gradients in its layers, against a loop."""

from functools import partial

import torch

import probes
from probes.models.encoder_cut import extra_tokens, layers_of_encoder
from probes.models.families.encoders import vision_config
from probes.models.measured_mask import seen_in_layers


def assert_cut(model, pixels, layers, keep_extra) -> None:
    """Patches of cut layers see themselves, and extra tokens if they are kept; all else is seen as before."""
    cut = probes.Knockout(site="encoder", layers=layers, keep_extra=keep_extra)
    config = model.model.config
    extra = extra_tokens(model.family, config)
    tokens = torch.arange(extra + model.image_tokens)
    along = torch.randn(
        vision_config(config).hidden_size, generator=torch.Generator().manual_seed(0)
    )
    run = partial(model.states, pixels, model.sites[-1:], cut)
    seen = seen_in_layers(layers_of_encoder(model), tokens, along, run)
    for layer, of_layer in enumerate(seen.tolist(), 1):
        for query, row in enumerate(of_layer):
            for key, is_seen in enumerate(row):
                expected = True
                if query >= extra and (layers is None or layer in layers):
                    expected = key == query or (key < extra and keep_extra)
                assert is_seen == expected, (layer, query, key)
