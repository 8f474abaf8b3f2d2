"""Which tokens of an encoder see which under a knockout, measured by gradients in its layers, against a loop."""

from functools import partial

import torch

import probes
from probes.models.encoder_cut import PatchEncoder
from probes.models.measured_mask import seen_in_layers


def measure(model, pixels, knockout) -> tuple[torch.Tensor, int]:
    """Return which tokens see which in each layer of the encoder, bool[L, N, N], and the number of extra tokens."""
    encoder = PatchEncoder.of(model)
    tokens = torch.arange(encoder.extra_tokens + len(encoder.token_of_patch))
    along = torch.randn(encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    run = partial(model.states, pixels, model.sites[-1:], knockout)
    return seen_in_layers(encoder.layers, tokens, along, run), encoder.extra_tokens


def assert_cut(model, pixels, layers, keep_extra) -> None:
    """Patches of cut layers see themselves, and extra tokens if they are kept; all else is seen as before."""
    cut = probes.Knockout(site="encoder", layers=layers, keep_extra=keep_extra)
    seen, extra = measure(model, pixels, cut)
    for layer, of_layer in enumerate(seen.tolist(), 1):
        for query, row in enumerate(of_layer):
            for key, is_seen in enumerate(row):
                expected = True
                if query >= extra and (layers is None or layer in layers):
                    expected = key == query or (key < extra and keep_extra)
                assert is_seen == expected, (layer, query, key)
