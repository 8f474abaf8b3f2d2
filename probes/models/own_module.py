"""Any module as a frozen encoder: what a user says of it, and the model that stands for a checkpoint's.

What is said is taken as it is, except where a mistake would not be seen: a forward of noise shows that each layer runs
once and reads what the one before it wrote, that its parts add up to what it adds, and that its tokens are the patches
of the image, row by row, after other tokens.

Shapes: B images, S side of the square input, N tokens (others, then patches), d width.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, PreTrainedModel

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.images import check_image_px
from probes.ops.geometry import ResizeRule

from .families.base import module_at
from .families.modules import ModuleConfig
from .hooks import StopForward, at_input, at_output

Preprocess = Callable[[Image.Image], Tensor] | tuple[Sequence[float], Sequence[float]]
INIT_STD = 0.02  # of ViT, DINOv2 and timm
CHECK_TOLERANCE = (
    1e-3  # of sums and of normalised values, relative to what is added: float32, or less
)
PREPROCESSED = (
    "a tensor f[3, S, S], the pixels of the PIL image that it is given, shifted and scaled"
)
TRIAL_PX = 64  # side of the photo that tells the side of what a preprocessing makes


@dataclass(frozen=True)
class EncoderModule:
    """A vision encoder of any class, described for :func:`probes.load`.

    Args:
        module: Called with pixels f[B, 3, S, S], it runs its layers; what it returns is not used.
        preprocess: Mean and standard deviation of the channels, for pixels of 0 to 1; or a function of a PIL image
            that returns f[3, S, S], of squares of S x S pixels these values alone.
        patch: Side of a patch in pixels.
        layers: Paths of the layers in forward order, ["blocks.0", "blocks.1", ...], or of the list of all, "blocks".
            States are f[B, tokens, width], and other tokens come before the patches.
        norm: Path of the norm after the last layer; None: there is no site "final_norm".
        parts: Paths in each layer of the modules whose outputs it adds to its input, {"attn": "attn", "mlp": "mlp"};
            without them there are neither these sites nor random layers with the trained updates.
        image_px: S; None: the side of what the function `preprocess` returns.
        resize_rule: How images become squares.
    """

    module: nn.Module
    preprocess: Preprocess
    patch: int
    layers: Sequence[str] | str
    norm: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    image_px: int | None = None
    resize_rule: ResizeRule = field(default_factory=ResizeRule)


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


def describe_module(encoder: EncoderModule) -> tuple[ModuleModel, CLIPImageProcessorPil]:
    """Return a module as a model with its config, and its normalisation.

    The model is a copy, so that neither eval mode nor random weights reach the module itself.

    Raises:
        UserError: The description does not fit the module.
    """
    image_px = encoder.image_px
    if image_px is None:
        if not callable(encoder.preprocess):
            raise UserError("the side of the input is not known; give image_px, in pixels")
        image_px = _preprocessed(encoder.preprocess, _plain("black", TRIAL_PX)).shape[-1]
    mean, std = normalisation(encoder.preprocess, image_px)
    check_image_px(image_px, encoder.patch, "image_px")
    names = layer_names(encoder)
    config = ModuleConfig(
        image_size=image_px,
        patch_size=encoder.patch,
        layer_names=names,
        norm_name=encoder.norm,
        has_parts=bool(encoder.parts),
    )
    model = ModuleModel(config, deepcopy(encoder.module)).eval().requires_grad_(False)
    layers = [module_at(model.module, name) for name in names]
    for layer in layers:
        if encoder.parts:
            layer.own_parts = {part: (path,) for part, path in encoder.parts.items()}
    with torch.no_grad():
        states = check_layer_states(model, layers=layers, names=names, parts=encoder.parts)
        config.extra_tokens = check_tokens(model, layers[0])
        if encoder.norm:
            states.append(module_at(model.module, encoder.norm)(states[-1]))
    config.site_widths = [of_site.shape[-1] for of_site in states]
    processor = CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=mean, image_std=std
    )
    return model, processor


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


def normalisation(preprocess: Preprocess, side: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the channels: as they are, or those of a function on squares.

    Raises:
        UserError: The values are none of pixels of 0 to 1, or the function does more to a square of its side.
    """
    if not callable(preprocess):
        mean, std = (list(map(float, values)) for values in preprocess)
        has_channels = len(mean) == len(std) == 3
        if not has_channels or max(*mean, *std) > 1 or min(std) <= 0:
            raise UserError(
                f"preprocess is {preprocess!r}; expected mean and standard deviation of three channels, for pixels of "
                "0 to 1; if they are of 0 to 255, divide both by 255"
            )
        return mean, std
    levels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    black = _preprocessed(preprocess, _plain("black", side))
    white = _preprocessed(preprocess, _plain("white", side))
    seen = _preprocessed(preprocess, Image.fromarray(levels))
    expected = black + (white - black) * torch.from_numpy(levels).movedim(-1, 0) / 255
    span = (white - black).mean((1, 2))
    if not _is_close(seen, expected, CHECK_TOLERANCE) or not span.all():
        raise UserError(
            f"preprocess does more to a square of {side} px than to shift and scale each channel, or ignores it, so "
            "that masks cannot be placed. Give (mean, std) instead, with image_px and, for the way in which photos "
            "become squares, image_resize"
        )
    std = 1 / span
    mean = -black.mean((1, 2)) * std
    return mean.tolist(), std.tolist()


def _preprocessed(preprocess: Preprocess, image: Image.Image) -> Tensor:
    """Return the pixels f32[3, S, S] of a function of an image; raise a UserError if it returns something else."""
    pixels = preprocess(image)
    if not isinstance(pixels, Tensor) or pixels.ndim != 3 or len(pixels) != 3:
        raise UserError(
            f"preprocess returned a {type(pixels).__name__}, shape {getattr(pixels, 'shape', '')}; expected a tensor "
            "f[3, S, S] of a PIL image"
        )
    return pixels.float()


def _plain(colour: str, side: int) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def _is_close(values: Tensor, expected: Tensor, tolerance: float) -> bool:
    if values.shape != expected.shape:
        return False
    return torch.allclose(values, expected, atol=tolerance, rtol=tolerance)


def _noise(model: ModuleModel, images: int) -> Tensor:
    """Return pixels of noise f[B, 3, S, S]."""
    side = model.config.image_size
    drawn = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    return drawn.to(model.device, model.dtype)


def check_layer_states(
    model: ModuleModel, layers: Sequence[nn.Module], names: Sequence[str], parts: Mapping[str, str]
) -> list[Tensor]:
    """Return the states f[2, N, d] at the input of the first layer and after each, in a forward of two images.

    Raises:
        UserError: The forward fails, a layer does not run once, its states are not f[2, N, d], it does not read what
            the layer before it wrote, its parts do not add up to what it adds, or another one runs, unnamed.
    """
    recorded = _record_layers(model, layers=layers, names=names, parts=parts)
    states = []
    for i, name in enumerate(names):
        runs = recorded[name, "after"]
        if len(runs) != 1:
            raise UserError(f"layer {name} runs {len(runs)} times in a forward; expected once")
        before = recorded[name, "before"][0]
        after = runs[0]
        if after.ndim != 3 or before.ndim != 3:
            raise UserError(
                f"states of 2 images at layer {name} are {list(after.shape)}; expected [2, tokens, width]"
            )
        if i == 0:
            states.append(before)
        elif not _is_close(before, states[-1], 1e-4):
            raise UserError(
                f"layer {name} does not read what {names[i - 1]} wrote. Name all layers, in the order of the forward; "
                "`sites` chooses which of them are probed"
            )
        if parts:
            added = [recorded[name, part][0] for part in parts if recorded[name, part]]
            _check_parts(name, before=before, after=after, added=added)
        states.append(after)
    for (path, what), read in recorded.items():
        if what == "unnamed" and read[0].shape == states[0].shape:
            raise UserError(f"{path}, of the layers' class, runs too. Name all layers")
    return states


def _record_layers(
    model: ModuleModel, layers: Sequence[nn.Module], names: Sequence[str], parts: Mapping[str, str]
) -> dict[tuple[str, str], list[Tensor]]:
    """Return the states f[2, N, d] of each run in a forward of two images, by path of a module and what they are.

    They are "before" and "after" a layer, those of its parts, and before an "unnamed" module of the layers' class.
    """
    kinds = {type(layer) for layer in layers}
    inside = {part for layer in layers for part in layer.modules()}
    recorded: dict[tuple[str, str], list[Tensor]] = defaultdict(list)

    def record(path: str, what: str, states: Tensor) -> None:
        recorded[path, what].append(states.clone())

    with ExitStack() as stack:
        for path, other in model.module.named_modules():
            is_around = not {*layers}.isdisjoint(other.modules())
            if type(other) in kinds and other not in inside and not is_around:
                stack.enter_context(at_input(other, partial(record, path, "unnamed")))
        for name, layer in zip(names, layers, strict=True):
            stack.enter_context(at_input(layer, partial(record, name, "before")))
            stack.enter_context(at_output(layer, partial(record, name, "after")))
            for part, path in parts.items():
                module = module_at(layer, path)
                stack.enter_context(at_output(module, partial(record, name, part)))
        stack.enter_context(error_context(f"a forward of 2 images of {model.config.image_size} px"))
        model(_noise(model, 2))
    return recorded


def _check_parts(name: str, before: Tensor, after: Tensor, added: Sequence[Tensor]) -> None:
    """Raise a UserError if what modules return does not add up to what a layer adds to its states."""
    change = after - before
    # where layer scale is small, it is all there is
    rounding = torch.finfo(after.dtype).eps * after.norm()
    most = CHECK_TOLERANCE * change.norm() + rounding
    fits = all(part.shape == change.shape for part in added)
    if not fits or (sum(added) - change).norm() > most:
        raise UserError(
            f"the outputs of parts of {name} do not add up to what it adds. Name the modules whose outputs it adds, "
            "with LayerScale (a module, not a parameter) parts={'attn': 'ls1', 'mlp': 'ls2'}"
        )


def check_tokens(model: ModuleModel, first: nn.Module) -> int:
    """Return the number of tokens before the patches.

    A patch of the image must change its own token most at the input of the first layer.

    Raises:
        UserError: There are fewer tokens than patches, or patches are not in raster order after the other tokens.
    """
    patch = model.config.patch_size
    side = model.config.image_size // patch
    last = side - 1
    cells = [(0, 0), (0, last), (last, 0), (last, last), (side // 3, side // 2)]
    pixels = _noise(model, 1).repeat(len(cells) + 1, 1, 1, 1)
    for image, (row, column) in enumerate(cells, 1):
        rows = slice(row * patch, (row + 1) * patch)
        columns = slice(column * patch, (column + 1) * patch)
        pixels[image, :, rows, columns] *= -1
    inputs: list[Tensor] = []

    def stop(states: Tensor) -> None:
        inputs.append(states.float())
        raise StopForward

    with at_input(first, stop), suppress(StopForward):
        model(pixels)
    (states,) = inputs
    extra = states.shape[1] - side**2
    if extra < 0:
        raise UserError(
            f"the first layer reads {states.shape[1]} tokens, and the input has {side} x {side} patches of {patch} px: "
            "patch or image_px does not fit"
        )
    changed = (states[1:] - states[:1]).norm(dim=-1).argmax(1).tolist()
    for (row, column), token in zip(cells, changed, strict=True):
        expected = extra + row * side + column
        if token != expected:
            raise UserError(
                f"the patch in row {row}, column {column} of {side} x {side} changes token {token} most at the first "
                f"layer; expected token {expected}, i.e. {extra} other tokens, then patches of {patch} px in raster "
                "order"
            )
    return extra
