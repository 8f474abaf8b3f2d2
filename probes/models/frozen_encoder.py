"""A frozen vision encoder without an LLM: the hidden states of its patches at every layer.

Shapes: B images, T patches, N tokens (extra tokens, then patches), d width, L layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import check_outputs
from probes.ops.geometry import ResizeRule

from .attention_weights import softmax_attention
from .families import EncoderFamily
from .families.layer_parts import recorded_parts
from .families.modules import MODULE_TYPE
from .frozen_model import FrozenModel
from .knockout import PREFIX, Knockout
from .read_states import StopForward
from .sites import FINAL_NORM, is_layer
from .steering import Replacement, replaced_states

BACKENDS = ("sdpa", "eager")  # that apply the mask of a knockout


def check_encoder(
    path: str,
    own: str,
    image_attention: str | None,
    prefix: str | None,
    backend: str,
) -> None:
    """Raise a UserError for settings that only an MLLM has, or an attention backend that ignores masks."""
    if image_attention not in (None, own):
        raise UserError(
            f"image_attention {image_attention!r}: {path} is a vision encoder without an LLM, whose patches attend to "
            f"all patches ({own}); leave it out"
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
    "mlp_01" ... (families/layer_parts.py). By name, several of these side by side, "layer_04+layer_08". CLS and
    register tokens are left out of the states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: EncoderFamily,
        image_processors: Sequence,
        resize_rule: ResizeRule,
        revision: str | None = None,
    ):
        attention = family.image_attention
        super().__init__(model, family, image_processors, attention, resize_rule, revision)
        self.layer_sites = [site for site in self.sites if is_layer(site)]
        extra = family.extra_tokens(model.config)
        tokens = extra + self.image_tokens
        self.register_buffer("is_image", torch.arange(tokens) >= extra, persistent=False)
        self.register_buffer("image_positions", torch.arange(extra, tokens), persistent=False)

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the encoder."""
        return self.family.layers_of(self.model)

    @torch.no_grad()
    def states(
        self,
        pixels: Tensor,
        sites: Sequence[str] | None = None,
        knockout: Knockout | None = None,
        rows: Sequence[int] | None = None,
        hooks: Mapping[str, Replacement] | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the hidden states of the patches at each site. Calling the model does the same.

        Args:
            pixels: f[B, 3, H, W] from :meth:`preprocess`.
            sites: Sites to return, None for all. The forward stops after the last of them.
            knockout: Attention knockout among patches (Eq. 1); CLS and registers attend as before.
            rows: Image of each row of the knockout, or of what the hooks receive, to run several on one image.
            hooks: Functions by site, "layer_00" to the last layer, that receive the states f[B, T, d] and return what
                the forward continues with.
            known: Accepted as of an MLLM, and not used: the forward always starts at the pixels.

        Returns:
            f[B, T, d] per site, patches in raster order, in the dtype of the model; f[R, T, d] for R `rows`.

        Raises:
            UserError: A site is unknown, the knockout or a hook's states do not fit the model, or states are NaN or
                infinite.
        """
        sites = self.check_sites(sites)
        if not sites:
            return {}
        self.check_pixels(pixels)
        if rows is not None:
            pixels = pixels[[int(row) for row in rows]]
        pixels = pixels.to(self.device, self.model.dtype)
        hooks = hooks or {}
        with ExitStack() as stack:
            if knockout:
                stack.enter_context(cut_attention(self, knockout, len(pixels)))
            input_site = self.layer_sites[0]
            stack.enter_context(
                replaced_states(self.layers, hooks, self.image_positions, input_site)
            )
            recorded = stack.enter_context(self._recorded(sites))
            with suppress(StopForward):
                self.model(**self.family.inputs(self.model.config, pixels))
        states = {site: recorded[site] for site in sites}
        check_outputs("states", states)
        return states

    forward = states

    @contextmanager
    def _recorded(self, wanted: list[str]) -> Iterator[dict[str, Tensor]]:
        """Record the states at sites while the context is open, and end the forward after the last of them."""
        states: dict[str, Tensor] = {}
        last = max(wanted, key=self.all_sites.index)
        stop_after = self.layer_sites[-1] if last == FINAL_NORM else last

        def record(site: str, hidden: Tensor | tuple) -> None:
            hidden = hidden[0] if isinstance(hidden, tuple | list) else hidden
            patches = hidden.index_select(1, self.image_positions)
            if site in wanted:
                states[site] = patches
            if site == self.layer_sites[-1] and FINAL_NORM in wanted:
                states[FINAL_NORM] = self.family.norm_of(self.model)(patches)
            if site == stop_after:
                raise StopForward

        def before_layers(module: nn.Module, args: tuple, kwargs: dict) -> None:
            record(self.layer_sites[0], args[0] if args else kwargs["hidden_states"])

        with ExitStack() as stack:
            stack.enter_context(recorded_parts(self.layers, wanted, self.widths, record))
            handle = self.layers[0].register_forward_pre_hook(before_layers, with_kwargs=True)
            stack.callback(handle.remove)
            for site, layer in zip(self.layer_sites[1:], self.layers, strict=True):

                def after(
                    module,
                    args,
                    output,
                    site=site,
                ):
                    return record(site, output)

                stack.callback(layer.register_forward_hook(after).remove)
            yield states


@contextmanager
def cut_attention(encoder: FrozenEncoder, knockout: Knockout, images: int) -> Iterator[None]:
    """Cut the attention among patches in the chosen layers while the context is open.

    Raises:
        UserError: The knockout does not fit, or a layer has no attention of transformers'.
    """
    if encoder.model.config.model_type == MODULE_TYPE:
        raise UserError(
            "knockouts cut the attention of models of transformers; that of a module of your own is not known"
        )
    tokens = len(encoder.is_image)
    shape = (images, 1, tokens, tokens)
    if encoder.model.config._attn_implementation == "eager":  # adds its mask to the scores
        allowed = torch.zeros(shape, dtype=encoder.model.dtype, device=encoder.device)
    else:
        allowed = torch.ones(shape, dtype=torch.bool, device=encoder.device)
    if PREFIX in (*knockout.names("rows"), *knockout.names("columns")):
        raise UserError(
            "a vision encoder has no prefix; cut attention between 'image' and 'blocked'"
        )
    cut = knockout.cut(allowed, encoder.is_image)
    chosen = knockout.select_layers(encoder.layers, images).to(encoder.device)
    if not knockout.is_eq_1:
        knockout.check_effect((cut != allowed).flatten(1).any(1), chosen.any(1))
    with ExitStack() as stack:
        for layer, in_rows in zip(encoder.layers, chosen.T, strict=True):
            if not in_rows.any():
                continue
            attention = softmax_attention(layer)
            if attention is None or "attention_mask" not in signature(attention.forward).parameters:
                raise UserError(f"{type(layer).__name__} has no attention that a knockout can cut")
            mask = torch.where(in_rows[:, None, None, None], cut, allowed)

            def replace_mask(
                module: nn.Module,
                args: tuple,
                kwargs: dict,
                mask: Tensor = mask,
            ) -> tuple:
                bias = kwargs.get("attention_mask")
                if bias is not None:  # of relative positions, which BEiT adds to the scores
                    mask = torch.where(
                        mask if mask.dtype == torch.bool else mask == 0, bias, -torch.inf
                    )
                return args[:1], kwargs | {"attention_mask": mask}

            handle = attention.register_forward_pre_hook(replace_mask, with_kwargs=True)
            stack.callback(handle.remove)
        yield
