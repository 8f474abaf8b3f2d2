"""The knockout's conditions and windows of layers in shared forwards, against one row in each forward."""

from collections.abc import Callable
from contextlib import ExitStack

import torch

from llava_bidir.model.modeling_llava_bidir import build_mask
from probes import Knockout
from probes.models.frozen_mllm import FrozenMLLM

# share of the image tokens; tokens after the image
BLOCKED = 0.15
TEXT = 64
CONDITIONS = 4  # the wrong class, the right class, and as many tokens at random as in each
IMAGES, SWEPT_IMAGES, WIDTH = (
    4,
    1,
    3,
)  # of which all conditions run; of which one runs in all windows; of sliding windows


class Rows:
    """Rows of a knockout: image, blocked tokens and cut layers."""

    def __init__(self, mllm: FrozenMLLM, sweep: bool):
        generator = torch.Generator().manual_seed(0)
        depth = len(mllm.decoder.layers)
        self.mllm = mllm
        tokens = mllm.grid[0] * mllm.grid[1]
        side = mllm.geometry.image_px
        images, conditions = (SWEPT_IMAGES, 1) if sweep else (IMAGES, CONDITIONS)
        layers = torch.arange(1, depth + 1)
        windows = [layers > 0]
        if sweep:  # as in layer_sweep.py: single, sliding, from, up to
            windows = [layers == i for i in layers]
            windows += [(layers >= i) & (layers < i + WIDTH) for i in layers[: depth - WIDTH + 1]]
            windows += [layers >= i for i in layers] + [layers <= i for i in layers]
        self.pixels = torch.randn(images, 3, side, side, generator=generator)
        order = torch.rand(images * conditions, tokens, generator=generator).argsort(-1)
        self.images = [image for image in range(images) for _ in range(conditions * len(windows))]
        self.blocked = (order < BLOCKED * tokens).repeat_interleave(len(windows), 0)
        self.layers = torch.stack(windows).repeat(images * conditions, 1)
        self.sites = [site for site in mllm.sites if site.startswith("layer_")]

    def shared(self) -> list[torch.Tensor]:
        """As `probes knockout`."""
        states = self.mllm.states(
            self.pixels, self.sites, Knockout(self.blocked, self.layers), self.images
        )
        return list(states.values())

    def one_by_one(self) -> list[torch.Tensor]:
        """One row a forward of the same API, from the encoder on."""
        rows = [
            self.mllm.states(
                self.pixels[[image]], self.sites, Knockout(self.blocked[[i]], self.layers[[i]])
            )
            for i, image in enumerate(self.images)
        ]
        return [torch.cat([row[site] for row in rows]) for site in self.sites]

    @torch.no_grad()
    def whole(self) -> list[torch.Tensor]:
        """One row a forward of the stock model over prefix, image and text, as tools for one prompt do."""
        mllm = self.mllm
        rows = []
        tokens = mllm.grid[0] * mllm.grid[1]
        prefix = mllm.prefix_ids.shape[1]
        image_id = mllm.model.config.image_token_id
        ids = torch.cat(
            [mllm.prefix_ids, torch.full((1, tokens), image_id), torch.full((1, TEXT), 7)], 1
        )
        mask = build_mask(
            mllm.image_attention, mllm.model.config.get_text_config(), ids == image_id
        )
        for i, image in enumerate(self.images):
            cut = mask.clone()
            cut[:, :, prefix : prefix + tokens, prefix + self.blocked[i].nonzero().flatten()] = (
                False
            )
            with ExitStack() as hooks:
                for layer, is_cut in zip(mllm.decoder.layers, self.layers[i].tolist(), strict=True):
                    given = cut if is_cut else mask

                    def hook(
                        _,
                        args,
                        kwargs,
                        given=given,
                    ):
                        return (
                            args,
                            {**kwargs, "attention_mask": given},
                        )

                    hooks.callback(
                        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True).remove
                    )
                pixels = self.pixels[[image]]
                out = mllm.model.model(
                    input_ids=ids,
                    pixel_values=pixels,
                    output_hidden_states=True,
                    use_cache=False,
                )
            rows.append(
                torch.stack(
                    [states[0, prefix : prefix + tokens] for states in out.hidden_states[1:-1]]
                )
            )
        return list(torch.stack(rows).movedim(1, 0))


def bench_knockout(mllms: dict[str, FrozenMLLM], paired: Callable, rounds: int) -> list[dict]:
    """Return the ratios for models by name: conditions that cut all layers, and one condition in windows of layers."""
    entries = []
    for name, mllm in mllms.items():
        for sweep in (False, True):
            rows = Rows(mllm, sweep)
            ours = rows.shared()
            for theirs in (
                rows.one_by_one(),
                rows.whole(),
            ):  # the stock model returns the last layer's states normed
                for a, b in zip(ours, theirs, strict=False):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            what = (
                f"{len(rows.images)} windows of layers"
                if sweep
                else f"{IMAGES} images under {CONDITIONS} knockouts"
            )
            for way, other in (
                ("a forward each", rows.one_by_one),
                ("a forward each with prefix and text", rows.whole),
            ):
                timed = paired(rows.shared, other, rounds)
                rate = {
                    f"{key}_rows_per_s": len(rows.images) / timed[f"{key}_s"]
                    for key in ("ours", "other")
                }
                entries.append({"name": f"{what}, {name}: {way} over shared layers"} | timed | rate)
    return entries
