"""Any module as a frozen encoder: what a user says of it, and the model that stands for a checkpoint's.

What can be measured is measured when the module is described, on random photos (`module_checks.py`): how many tokens
come before the patches, that patches are in raster order, that each layer reads what the one before it wrote, and
where attention and MLP are. A description that does not fit is an error before any work.

Shapes: B images, S side of the square input.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, PreTrainedModel

from llava_bidir.common.errors import UserError
from llava_bidir.common.images import check_image_px
from probes.ops.geometry import ResizeRule

from .families.base import module_at
from .families.modules import ModuleConfig
from .measured_preprocess import MeasuredPreprocess, measure_preprocess
from .module_checks import check_norm, check_tokens, find_parts, trace_layers, unread_notes

Preprocess = Callable[[Image.Image], Tensor] | tuple[Sequence[float], Sequence[float]]
INIT_STD = 0.02  # of ViT, DINOv2 and timm


@dataclass(frozen=True)
class EncoderModule:
    """A vision encoder of any class, described for :func:`probes.load`.

    Args:
        module: Called with pixels f[B, 3, S, S], it runs its layers; what it returns is not used.
        preprocess: Mean and standard deviation of the channels, for pixels of 0 to 1; or a function of a PIL image
            that returns f[3, S, S], of which these are measured.
        patch: Side of a patch in pixels.
        layers: Paths of the layers in forward order, ["blocks.0", "blocks.1", ...], or of the list of all, "blocks".
            States are f[B, tokens, width], and other tokens come before the patches.
        norm: Path of the norm after the last layer; None: there is no site "final_norm".
        image_px: S; None: as large as `preprocess` makes photos.
        resize_rule: How images become squares; None: `preprocess` does not say, so that `image_resize` must be given.
    """

    module: nn.Module
    preprocess: Preprocess
    patch: int
    layers: Sequence[str] | str
    norm: str | None = None
    image_px: int | None = None
    resize_rule: ResizeRule | None = None


class ModuleModel(PreTrainedModel):
    """A copy of a user's module in the place of a checkpoint's model."""

    config_class = ModuleConfig

    def __init__(self, config: ModuleConfig, module: nn.Module):
        super().__init__(config)
        self.module = module

    def forward(self, pixel_values: Tensor) -> None:
        """Run the module on pixels f[B, 3, S, S]."""
        self.module(pixel_values)

    def tie_weights(self, *args, **kwargs) -> None:
        """Leave the module as it is: modules that share weights are one object in it."""

    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights as ViT does: small matrices, no biases, norms of 1. Other vectors stay, e.g. layer scale."""
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=INIT_STD)
            elif "bias" in name:
                nn.init.zeros_(parameter)


def describe_module(
    encoder: EncoderModule,
) -> tuple[ModuleModel, CLIPImageProcessorPil, MeasuredPreprocess]:
    """Return a module as a model with its config, its normalisation, and what its preprocessing does.

    The model is a copy, so that neither eval mode nor random weights reach the module itself.

    Raises:
        UserError: The description does not fit the module; says what was measured.
    """
    names = layer_names(encoder)
    for name in names:
        module_at(encoder.module, name)
    measured = measure_preprocess(encoder.preprocess)
    image_px = encoder.image_px or measured.side_px
    if image_px is None:
        raise UserError("the side of the input is not known; give image_px, in pixels")
    if type(encoder.patch) is not int:
        raise UserError(f"patch is {encoder.patch!r}; expected the side of a patch in pixels")
    check_image_px(image_px, encoder.patch, "image_px")
    if next(encoder.module.parameters(), None) is None:
        raise UserError(f"{type(encoder.module).__name__} has no parameters")
    config = ModuleConfig(
        image_size=image_px,
        patch_size=encoder.patch,
        layer_names=names,
        norm_name=encoder.norm,
    )
    model = ModuleModel(config, deepcopy(encoder.module)).eval().requires_grad_(False)
    layers = [module_at(model.module, name) for name in names]
    with torch.no_grad():
        trace = trace_layers(model, layers, names, image_px)
        again = trace_layers(model, layers, names, image_px)
        if not torch.equal(trace[-1].left, again[-1].left):
            raise UserError(
                f"two forwards of {type(encoder.module).__name__} on the same pixels differ in eval mode; expected the "
                "same states: is there dropout, or noise, that eval mode does not end?"
            )
        grid_side = image_px // encoder.patch
        grid = (grid_side, grid_side)
        config.extra_tokens, mixed = check_tokens(model, layers[0], grid, encoder.patch)
        config.site_widths = [trace[0].entered.shape[-1], *(run.left.shape[-1] for run in trace)]
        if encoder.norm:
            norm = module_at(model.module, encoder.norm)
            config.site_widths.append(check_norm(norm, encoder.norm, trace[-1].left))
        config.why_no_parts = find_parts(model, layers, names, trace, image_px)
        config.unread_notes = unread_notes(
            model,
            model.module,
            names,
            encoder.norm,
            trace,
            mixed,
            image_px,
        )
    processor = CLIPImageProcessorPil(
        do_resize=False,
        do_center_crop=False,
        image_mean=measured.mean,
        image_std=measured.std,
    )
    return model, processor, measured._replace(rule=encoder.resize_rule or measured.rule)


def layer_names(encoder: EncoderModule) -> list[str]:
    """Return the paths of the layers: as they are, or those in the list that one path names.

    Raises:
        UserError: There is none.
    """
    names = encoder.layers
    if isinstance(names, str):
        listed = module_at(encoder.module, names)
        names = [f"{names}.{name}" for name, _ in listed.named_children()]
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"layers is {encoder.layers!r}; expected the paths of layers, each once, or of the list of all"
        )
    return list(names)
