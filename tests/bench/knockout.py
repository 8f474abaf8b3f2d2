"""The knockout's conditions in shared batches, against the way they are usually run."""

from collections.abc import Callable
from contextlib import ExitStack

import torch

from llava_bidir.model.modeling_llava_bidir import build_mask
from probes import Knockout
from probes.models.frozen_mllm import FrozenMLLM

IMAGES, BLOCKED, TEXT = 4, 20, 64
CONDITIONS = 5  # nothing, the wrong class, the right class, and as many tokens at random as in each


def bench_knockout(mllm: FrozenMLLM, paired: Callable, rounds: int) -> list[dict]:
    """States at all layers of 4 images under 5 conditions, 20 of 144 tokens blocked.

    Theirs runs one image under one condition a forward, over prefix, image and text, and builds each layer's mask anew:
    from tensors, or by a Python loop over pairs of tokens, as published tools do.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, prefix = mllm.grid[0] * mllm.grid[1], mllm.prefix_ids.shape[1]
    pixels = torch.randn(IMAGES, 3, 168, 168, generator=generator)
    order = torch.rand(IMAGES, CONDITIONS, tokens, generator=generator).argsort(-1)
    blocked = order < BLOCKED
    blocked[:, 0] = False
    layers = [site for site in mllm.sites if site.startswith("layer_")]
    text = torch.randint(1, 2000, (1, TEXT), generator=generator)
    ids = torch.cat([mllm.prefix_ids, torch.full((1, tokens), mllm.model.config.image_token_id), text], 1)
    is_image = ids == mllm.model.config.image_token_id

    def shared() -> list[torch.Tensor]:
        """As `probes knockout`: unmodified states once, the other conditions in batches."""
        plain = mllm.states(pixels, layers)
        rows = torch.arange(IMAGES).repeat_interleave(CONDITIONS - 1)
        cut = mllm.states(pixels[rows], layers, Knockout(blocked[:, 1:].flatten(0, 1)))
        return [torch.cat([plain[site][:, None], cut[site].unflatten(0, (IMAGES, -1))], 1) for site in layers]

    def mask_of(gone: torch.Tensor, by_pairs: bool) -> torch.Tensor:
        mask = build_mask(mllm.image_attention, mllm.model.config.get_text_config(), is_image, dtype=torch.float32)
        mask = mask.clone()
        columns = prefix + gone.nonzero().flatten()
        if not by_pairs:
            mask[:, :, prefix : prefix + tokens, columns] = False
            return mask
        for query in range(prefix, prefix + tokens):
            for key in columns.tolist():
                mask[0, 0, query, key] = False
        return mask

    @torch.no_grad()
    def one_by_one(by_pairs: bool) -> list[torch.Tensor]:
        found = []
        for image in range(IMAGES):
            for gone in blocked[image]:
                with ExitStack() as hooks:
                    for layer in mllm.decoder.layers:
                        hook = lambda module, args, kwargs, gone=gone: (
                            args,
                            {**kwargs, "attention_mask": mask_of(gone, by_pairs)},
                        )
                        handle = layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
                        hooks.callback(handle.remove)
                    out = mllm.model(
                        input_ids=ids, pixel_values=pixels[[image]], output_hidden_states=True, use_cache=False
                    )
                found.append(torch.stack([h[0, prefix : prefix + tokens] for h in out.hidden_states[1:-1]]))
        return list(torch.stack(found).unflatten(0, (IMAGES, CONDITIONS)).movedim(2, 0))

    for ours, theirs in zip(shared(), one_by_one(by_pairs=False), strict=False):  # theirs ends before the last layer
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    entries = []
    for by_pairs, how in ((False, "from tensors"), (True, "by a loop over pairs")):
        timed = paired(shared, lambda by_pairs=by_pairs: one_by_one(by_pairs), rounds)
        rate = {"ours_images_per_s": IMAGES / timed["ours_s"], "other_images_per_s": IMAGES / timed["other_s"]}
        entries.append(
            {"name": f"{CONDITIONS} knockout conditions, one a forward, masks {how}, over shared batches"}
            | timed
            | rate
        )
    return entries
