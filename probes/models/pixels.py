"""Image normalisation of a checkpoint, and how it makes photos squares.

Stock image processors are not run: each splits and crops images in its own way. Of their settings, the normalisation
and how they resize are read: filter, sides, crop.
"""

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from transformers import CLIPImageProcessorPil, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from llava_bidir.common.errors import UserError, error_context
from probes.ops.geometry import Geometry, ResizeRule

from .families.encoders import AnyFamily
from .read_config import Checkpoint

PIXEL_SETTINGS = (
    "resample",
    "size",
    "crop_size",
    "max_image_size",
    "default_to_square",
    "do_center_crop",
    "do_image_splitting",
    "do_pad",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
)
MAX_ENLARGED = 8  # a processor's side before a crop or a thumbnail, in units of the side after


def read_image_processors(checkpoint: Checkpoint) -> tuple[list[CLIPImageProcessorPil], ResizeRule]:
    """Return an image processor per normalisation, of pixels of 0 to 1, and how the checkpoint resizes.

    Settings that the file lacks are those of the class that it names.

    Raises:
        UserError: The normalisation is not defined, or a setting of resizing cannot be.
    """
    family = checkpoint.family
    with error_context(f"preprocessor_config.json of {checkpoint.path}"):
        stored = _read_processor_settings(checkpoint)
        # as in transformers, null is as good as missing
        stored = {key: value for key, value in stored.items() if value is not None}
        settings = _class_defaults(stored) | stored
        if settings.get("do_normalize") is False:  # files need not have numbers that nothing reads
            for mean, std in family.normalisations:
                settings |= {mean: [0.0] * 3, std: [1.0] * 3}
        white = 255.0
        if settings.get("do_rescale", True):
            white *= settings.get("rescale_factor", 1 / 255)
        for key in (key for keys in family.normalisations for key in keys):
            value = settings.get(key) or ()
            is_mean = "mean" in key
            if len(value) != 3 or not all(0 < x <= white or (x == 0 and is_mean) for x in value):
                raise UserError(
                    f"{key} is {settings.get(key)}; expected three positive numbers, not above that of white, {white:g}"
                )
        rule = _resize_rule(settings, family)
    # that of the training goes before the file
    rule = rule.replaced_by(getattr(checkpoint.config, "image_resize", None))
    processors = [
        CLIPImageProcessorPil(
            do_resize=False,
            do_center_crop=False,
            image_mean=[x / white for x in settings[mean]],
            image_std=[x / white for x in settings[std]],
        )
        for mean, std in family.normalisations
    ]
    return processors, rule


def geometry_of(
    family: AnyFamily, config: PreTrainedConfig, image_processors: Sequence, rule: ResizeRule
) -> Geometry:
    """Return how a model sees images, from its config, image processors and resize rule."""
    # the last one's pixels are those of the square; DeepSeek-VL makes the smaller ones of them
    mean_colour = tuple(int(255 * x) for x in image_processors[-1].image_mean)
    return Geometry(
        grid=family.grid(config),
        image_px=family.side_px(config),
        covered_px=family.covered_px(config),
        rule=rule,
        padding=rule.padding or mean_colour,
    )


def _read_processor_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings of a checkpoint's image processor.

    Raises:
        UserError: A folder has none; names the settings that are needed.
    """
    path = checkpoint.path
    try:
        return ImageProcessingMixin.get_image_processor_dict(path, revision=checkpoint.revision)[0]
    except OSError as error:
        damaged = isinstance(error.__context__, json.JSONDecodeError)
        if damaged or not Path(path).is_dir():
            raise
    keys = [key for keys in checkpoint.family.normalisations for key in keys]
    example = {key: [0.5, 0.5, 0.5] for key in keys} | {"resample": 3}
    raise UserError(
        f"the file is missing, which says how photos become pixels; copy it from the published model, or write it with "
        f"the model's own numbers, as {json.dumps(example)} (resample: 2 is bilinear, 3 bicubic)"
    ) from None


def _class_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of the image processor that a file names; none if the installed transformers has no such one.

    Of a processor with several backends, the one with Pillow is asked: others need torchvision.
    """
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    name = str(kind).replace("FeatureExtractor", "ImageProcessor")
    name = name.removesuffix("Fast").removesuffix("Pil") + "Pil"
    processor = getattr(transformers, name, None)
    defaults = {key: getattr(processor, key, None) for key in PIXEL_SETTINGS}
    return {key: value for key, value in defaults.items() if value is not None}


def _resize_rule(settings: dict[str, Any], family: AnyFamily) -> ResizeRule:
    """Return how images become squares by a family and the settings of an image processor."""
    resample = settings.get("resample", Image.Resampling.BICUBIC)
    if resample not in list(Image.Resampling):
        filters = ", ".join(f"{x.value} ({x.name.lower()})" for x in Image.Resampling)
        raise UserError(f"resample is {resample!r}; expected one of {filters}")
    resample = Image.Resampling(resample)
    size = settings.get("size")
    if thumbnail := settings.get("max_image_size"):
        return ResizeRule(
            family.image_resize or "squash",
            resample,
            before_thumbnail=_ratio(
                "size", resized=size, kept_name="max_image_size", kept=thumbnail
            ),
            splits=bool(settings.get("do_image_splitting")),
        )
    way = "squash"
    if settings.get("do_pad"):
        way = "pad"
    if family.image_resize or not settings.get("do_center_crop"):
        return ResizeRule(family.image_resize or way, resample)
    if way == "squash" and _is_of_shorter_side(size, settings.get("default_to_square", False)):
        way = "center_crop"
    crop = settings.get("crop_size")
    if size is None or crop is None:
        return ResizeRule(way, resample)
    return ResizeRule(way, resample, _ratio("size", resized=size, kept_name="crop_size", kept=crop))


def _is_of_shorter_side(size: Any, to_square: bool) -> bool:
    """Return whether the size of an image processor is that of the shorter side, not of both."""
    if isinstance(size, Mapping):
        return "shortest_edge" in size
    return not isinstance(size, list) and not to_square


def _ratio(resized_name: str, resized: Any, kept_name: str, kept: Any) -> Fraction:
    """Return the side to which images are resized in units of the side that is kept, from two settings."""
    before = _side(resized_name, resized)
    after = _side(kept_name, kept)
    if not after <= before <= MAX_ENLARGED * after:
        raise UserError(
            f"{resized_name} is {before} px and {kept_name} {after} px; expected a {resized_name} of {after} to "
            f"{MAX_ENLARGED * after} px"
        )
    return Fraction(before, after)


def _side(name: str, size: Any) -> int:
    """Return the side in a setting of an image processor: a number, or the largest of several."""
    sides = size
    if isinstance(size, Mapping):
        sides = size.values()
    elif not isinstance(size, list):
        sides = [size]
    sides = [side for side in sides if side is not None]
    if not sides or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"{name} is {size!r}; expected numbers of pixels, at least 1")
    return max(sides)
