"""A frozen vision encoder without an LLM: the hidden states of its patches at every layer.

Shapes: B images, T patches, N tokens (extra tokens, then patches), d width, L layers.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_bidir.common.encoders import count_extra_tokens, vision_config
from llava_bidir.common.errors import UserError
from probes.ops.geometry import ResizeRule

from .encoder_cut import cut_encoder
from .families import EncoderFamily
from .frozen_model import FrozenModel
from .knockout import Knockout
from .sites import is_layer

BACKENDS = ("sdpa", "eager")  # that apply the mask of a knockout


def check_encoder(
    path: str, trained_with: str, image_attention: str | None, prefix: str | None, backend: str
) -> None:
    """Raise a UserError for settings that only an MLLM has, or an attention backend that ignores masks."""
    if image_attention not in (None, trained_with):
        raise UserError(
            f"image_attention {image_attention!r}: {path} is a vision encoder without an LLM, whose patches attend to "
            f"all patches ({trained_with}); leave it out"
        )
    if prefix is not None:
        raise UserError(
            f"{path} is a vision encoder without an LLM, so it has no text before the image; leave out prefix"
        )
    if backend not in BACKENDS:
        raise UserError(
            f"attn_implementation {backend!r} ignores the masks of knockouts; use {' or '.join(BACKENDS)}"
        )


class FrozenEncoder(FrozenModel):
    """A vision encoder in eval mode without gradients, created by :func:`probes.load`.

    Its sites are "layer_00" (input of the first layer), "layer_01" ... (outputs of the layers) and "final_norm" (the
    last layer after the model's norm). By name, or with "all_parts", also the parts of layers, "value_01", "attn_01",
    "mlp_01" ... (families/layer_parts.py). CLS and register tokens are left out of the states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: EncoderFamily,
        image_processors: Sequence,
        resize_rule: ResizeRule,
    ):
        attention = family.image_attention
        super().__init__(model, family, image_processors, attention, resize_rule)
        self.layer_sites = [site for site in self.sites if is_layer(site)]
        extra = count_extra_tokens(family, vision_config(model.config))
        tokens = extra + self.image_tokens
        self.register_buffer("is_image", torch.arange(tokens) >= extra, persistent=False)
        self.register_buffer("image_positions", torch.arange(extra, tokens), persistent=False)

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the encoder."""
        return self.family.layers_of(self.model)

    def run(self, pixels: Tensor) -> None:
        """Run the encoder."""
        self.model(**self.family.inputs(self.model.config, pixels))

    def masked(
        self, knockout: Knockout | None, rows: int, last: str
    ) -> AbstractContextManager[None]:
        """Cut the attention among patches by a knockout; CLS and registers attend as before."""
        return cut_encoder(self, knockout, rows)
