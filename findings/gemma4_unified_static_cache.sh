#!/usr/bin/env bash
# An encoder-free Gemma 4 sees other image tokens with a static cache than without one.
#
# Guess: a cache changes how keys are stored and not which of them a token attends to. So the logits of `generate` about
# an image are the same with the default and with a static cache, up to rounding.
# Found (transformers 5.24.0, torch 2.13.0, on a CPU): in layers of full attention, image tokens attend to later image
# tokens in a plain forward and in `generate`, but not in `generate` with cache_implementation="static"; there the model's
# own helper makes the mask, which says in its docstring that these layers are causal. Logits of the first new token of a
# random model with one layer of full attention differ by more than a hundredth of their largest value; of one with a
# layer of sliding attention, they are equal to 1e-5.
# Who meets it: whoever compares answers from two servers, or reads states in a forward and generates with a static cache.
#
# Needs Python >= 3.10 and a network; works in a temporary folder. Fails if the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 numpy==2.3.5 transformers==5.24.0

cat >compare.py <<'PY'
import torch
from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

IMAGE, SIDE = 60, 4


def largest_difference(kinds):
    """Return how much the logits of `generate` differ between the caches, in units of the largest one."""
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=len(kinds), layer_types=kinds)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8, initializer_range=0.3)
    vision = dict(patch_size=2, mm_embed_dim=24, output_proj_dims=24, initializer_range=0.3)
    special = dict(image_token_id=IMAGE, video_token_id=61, audio_config=None)
    config = Gemma4UnifiedConfig(text_config=text, vision_config=vision, **special)
    torch.manual_seed(0)
    model = Gemma4UnifiedForConditionalGeneration(config).eval()
    ids = torch.tensor([[2, 3, *[IMAGE] * SIDE**2, 4, 5]])
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int())
    inputs |= dict(pixel_values=torch.rand(1, SIDE**2, 6 * 6 * 3), image_position_ids=torch.stack([x, y], -1).view(1, -1, 2))
    with torch.no_grad():
        forward = model(**inputs).logits[:, -1]
    logits = {}
    for cache in (None, "static"):
        out = model.generate(**inputs, max_new_tokens=1, do_sample=False, cache_implementation=cache,
                             output_logits=True, return_dict_in_generate=True)
        logits[cache] = out.logits[0]
    assert (logits[None] - forward).abs().max() < 1e-5 * forward.abs().max(), "the behaviour has changed"
    return ((logits["static"] - forward).abs().max() / forward.abs().max()).item()


# The last layer is one of full attention in any case; two such layers, so that image tokens matter to the last token.
full = largest_difference(["full_attention", "full_attention"])
sliding = largest_difference(["sliding_attention", "full_attention"])
print(f"two layers of full attention: logits differ by {full:.4f} of the largest, after one of sliding attention by {sliding:.7f}")
assert full > 0.01 and sliding < 1e-5, "the behaviour has changed"
PY
env/bin/python compare.py
