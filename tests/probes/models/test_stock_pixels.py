"""Pixels of every family equal those of its stock image processor, with its filter, crop and padding."""

import json
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import tiny_encoders
import tiny_families
import torch
import transformers
from PIL import Image
from tiny_families import MEAN, SIDE, STD

import probes
from probes.models.families import FAMILIES, dynamic_resolution
from probes.models.pixels import read_image_processors
from probes.ops.geometry import ResizeRule

pytestmark = pytest.mark.usefixtures("small_squares")

SQUARE = (90, 90)
SIZES = (SQUARE, (120, 90), (61, 97))  # width, height
BILINEAR = Image.Resampling.BILINEAR
LANCZOS = Image.Resampling.LANCZOS
BOTH_SIDES = {"height": 24, "width": 24}
SHORTER_SIDE = {"size": {"shortest_edge": 24}, "crop_size": BOTH_SIDES}
TOKENS_PX = 4 * SIDE  # of families with two patches of 2 px per token and side


@dataclass(frozen=True)
class StockProcessor:
    """An image processor of transformers.

    Args:
        name: Its class; of those that need torchvision, the one with Pillow.
        settings: Its options.
        view: Index of the view that the sites see, among the views of an image.
        square_only: Other photos keep their shape, which the sites do not see.
        is_patches: It returns patches, as the family's own forward takes them.
    """

    name: str
    settings: dict = field(default_factory=dict)
    view: int = 0
    square_only: bool = False
    is_patches: bool = False

    def build(self):
        """Return the processor with the means of the tiny models."""
        means = {"image_mean": MEAN, "image_std": STD}
        return getattr(transformers, self.name)(**(means | self.settings))

    def pixels(self, photo: Image.Image) -> torch.Tensor:
        """Return the pixels of the view that the sites see."""
        pixels = torch.as_tensor(np.array(self.build()([[photo]])["pixel_values"]))
        if self.is_patches:
            return pixels
        return pixels.reshape(-1, *pixels.shape[-3:])[self.view][None]


def _idefics(name: str, **kwargs) -> StockProcessor:
    sides = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 24}}
    return StockProcessor(name, sides | kwargs, view=-1)


def _square(side: int) -> dict[str, int]:
    """Return the least and the most pixels of a square."""
    return {"shortest_edge": side**2, "longest_edge": side**2}


def _patches(name: str, **kwargs) -> StockProcessor:
    settings = {
        "patch_size": 2,
        "merge_size": 2,
        "size": _square(TOKENS_PX),
    }
    return StockProcessor(name, settings | kwargs, square_only=True, is_patches=True)


_CLIP = StockProcessor("CLIPImageProcessorPil", SHORTER_SIDE)
_TILES = {"image_grid_pinpoints": [[24, 48], [48, 24]]}
_GOT = {"size": BOTH_SIDES, "min_patches": 1, "max_patches": 4}
_QWEN = _patches("Qwen2VLImageProcessorPil")
_FRAMES = {"size": {side: 2 * pixels for side, pixels in _square(TOKENS_PX).items()}}
_GLM = _patches("Glm4vImageProcessorPil", **_FRAMES)
_PIXTRAL = StockProcessor(
    "PixtralImageProcessorPil",
    {"size": {"longest_edge": TOKENS_PX}, "patch_size": {"height": 4, "width": 4}},
    square_only=True,
)
_SIGLIP = StockProcessor("SiglipImageProcessorPil", {"size": BOTH_SIDES})
_SIGLIP2 = StockProcessor(
    "Siglip2ImageProcessorPil",
    {"patch_size": 4, "max_num_patches": 36},
    square_only=True,
    is_patches=True,
)
_VIT = StockProcessor("ViTImageProcessorPil", {"size": BOTH_SIDES})
_BEIT = StockProcessor("BeitImageProcessorPil", {"size": BOTH_SIDES})
# as published: a square of 256 px, of which 224 are kept
_DEIT = StockProcessor(
    "DeiTImageProcessorPil",
    {"size": {"height": 27, "width": 27}, "crop_size": BOTH_SIDES},
)
# as published: the shorter side resized to 256 px, of which 224 are kept
_DINOV2 = StockProcessor(
    "BitImageProcessorPil", {"size": {"shortest_edge": 27}, "crop_size": BOTH_SIDES}
)

PROCESSORS = {
    "llava": [
        StockProcessor("LlavaImageProcessorPil", SHORTER_SIDE | {"do_pad": True}),
        StockProcessor("LlavaImageProcessorPil", SHORTER_SIDE),
        _CLIP,
    ],
    "vipllava": [_CLIP],
    "llava_next": [StockProcessor("LlavaNextImageProcessorPil", SHORTER_SIDE | _TILES)],
    "llava_onevision": [
        StockProcessor("LlavaOnevisionImageProcessorPil", {"size": BOTH_SIDES} | _TILES)
    ],
    "deepseek_vl": [StockProcessor("DeepseekVLImageProcessorPil", {"size": BOTH_SIDES})],
    "janus": [StockProcessor("JanusImageProcessorPil", {"size": BOTH_SIDES})],
    "gemma3": [StockProcessor("Gemma3ImageProcessorPil", {"size": BOTH_SIDES})],
    "paligemma": [_SIGLIP],
    "gemma4": [
        StockProcessor(
            "Gemma4ImageProcessorPil",
            {
                "patch_size": 2,
                "max_soft_tokens": 70,
                "do_normalize": True,
            },
            square_only=True,
            is_patches=True,
        )
    ],
    "internvl": [
        StockProcessor("GotOcr2ImageProcessorPil", _GOT),
        StockProcessor("GotOcr2ImageProcessorPil", _GOT | {"crop_to_patches": True}, view=-1),
    ],
    "idefics3": [
        _idefics("Idefics3ImageProcessorPil"),
        _idefics("Idefics3ImageProcessorPil", do_image_splitting=False),
    ],
    "smolvlm": [_idefics("SmolVLMImageProcessorPil", resample=BILINEAR)],
    "aya_vision": [StockProcessor("GotOcr2ImageProcessorPil", _GOT)],
    "qianfan_ocr": [StockProcessor("GotOcr2ImageProcessorPil", _GOT)],
    "ovis2": [StockProcessor("Ovis2ImageProcessorPil", {"size": BOTH_SIDES})],
    "glm46v": [_patches("Glm46VImageProcessorPil", **_FRAMES)],
    **dict.fromkeys(("mistral3", "lighton_ocr"), [_PIXTRAL]),
    "paddleocr_vl": [_patches("PaddleOCRVLImageProcessorPil")],
    "video_llama_3": [
        _patches("VideoLlama3ImageProcessorPil", merge_size=1, size=_square(2 * SIDE))
    ],
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "pixio"), [_DINOV2]),
    **dict.fromkeys(("clip", "clip_vision_model"), [_CLIP]),
    **dict.fromkeys(("metaclip_2", "metaclip_2_vision_model"), [_CLIP]),
    **dict.fromkeys(("aimv2_vision_model", "mlcd_vision_model"), [_CLIP]),
    **dict.fromkeys(
        ("siglip", "siglip_vision_model"),
        [
            _SIGLIP,
            StockProcessor("SiglipImageProcessorPil", _SIGLIP.settings | {"resample": LANCZOS}),
        ],
    ),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), [_SIGLIP2]),
    **dict.fromkeys(("vit", "ijepa", "vit_msn", "vit_mae"), [_VIT]),
    **dict.fromkeys(("beit", "data2vec-vision"), [_BEIT]),
    "deit": [_DEIT],
}
# Their only processor needs torchvision, whose resize is torch's own with antialias.
OF_TORCH = {
    "dinov3_vit": "bilinear",
    "cohere2_vision": "bicubic",
    "gemma4_unified": "bicubic",
    "lfm2_vl": "bilinear",
    "kimi_k25": "bicubic",
    **dict.fromkeys(("tipsv2", "tipsv2_vision_model", "sapiens2"), "bilinear"),
}
# LLaVA's processor; one with tests of its own; one for which transformers has none
WITHOUT = {"llava_bidir", "deepseek_vl_hybrid", "radio", *OF_TORCH}


def processors_of(name: str) -> list[StockProcessor]:
    """Return the processors of a family; Qwen's and GLM's take patches, whatever their LLM is."""
    of_qwen = (dynamic_resolution._patches, dynamic_resolution._untyped_patches)
    if name not in PROCESSORS and FAMILIES[name].inputs in of_qwen:
        return [_GLM if name.startswith("glm") else _QWEN]
    return PROCESSORS.get(name, [])


CASES = [
    pytest.param(name, stock, id=f"{name}-{number}")
    for name in FAMILIES
    for number, stock in enumerate(processors_of(name))
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the folder of a checkpoint, written once; its image processor is replaced by each test."""

    @cache
    def folder(name):
        path = tmp_path_factory.mktemp(name)
        if name in tiny_encoders.STOCK:
            tiny_encoders.STOCK[name].write(path)
        else:
            tiny_families.write(name, path)
        return path

    return folder


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Return a photo with structure at several scales."""
    noise = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for scale in (1, 6, 25):
        knots = noise.integers(0, 255, (size[1] // scale + 1, size[0] // scale + 1, 3), np.uint8)
        total += np.asarray(Image.fromarray(knots).resize(size, Image.Resampling.BICUBIC)) / 3
    return Image.fromarray(total.astype(np.uint8))


def pixels_of(model, image: Image.Image, is_patches: bool) -> torch.Tensor:
    """Return the pixels of the package, as patches for a processor that makes such."""
    pixels = model.preprocess(image)
    if not is_patches:
        return pixels
    if not model.has_llm:
        return model.family.inputs(model.model.config, pixels)["pixel_values"]
    return model.family.inputs(model.model, pixels, model.is_image[None])["pixel_values"]


def test_every_family_has_a_stock_processor_here():
    assert {name for name in FAMILIES if not processors_of(name)} == WITHOUT


@pytest.mark.parametrize(("name", "stock"), CASES)
def test_pixels_equal_those_of_the_stock_processor(name, stock, checkpoint):
    """The filter, the crop, the padding and the detour over a larger photo are the processor's."""
    stock.build().save_pretrained(checkpoint(name))
    model = probes.load(str(checkpoint(name)), device="cpu")
    for size in [SQUARE] if stock.square_only else SIZES:
        image = photo(size)
        expected = stock.pixels(image)
        ours = pixels_of(model, image, stock.is_patches)
        count = min(len(expected.flatten()), len(ours.flatten()))  # Gemma 4 pads its patches
        difference = (ours.flatten()[:count] - expected.flatten()[:count]).abs().max()
        assert count == ours.numel() and difference < 1e-5, (
            size,
            model.geometry.rule,
        )


@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_the_larger_view_equal_those_of_the_stock_processor(size, checkpoint):
    """DeepSeek-VL's SAM; the smaller view is made of it with less than one grey level of difference."""
    folder = checkpoint("deepseek_vl_hybrid")
    stock = tiny_families.stock_hybrid([photo(size)])
    model = probes.load(str(folder), device="cpu")
    inputs = model.family.inputs(model.model, model.preprocess(photo(size)), model.is_image[None])
    torch.testing.assert_close(inputs["high_res_pixel_values"], stock["high_res_pixel_values"])
    grey_level = 1 / 255 / min(STD)
    assert (inputs["pixel_values"] - stock["pixel_values"]).abs().max() < grey_level


@pytest.mark.parametrize("name", OF_TORCH)
def test_pixels_equal_torchs_resize_to_one_grey_level(name, checkpoint):
    filters = {"bilinear": BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    settings = {
        "resample": int(filters[OF_TORCH[name]]),
        "size": BOTH_SIDES,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (checkpoint(name) / "preprocessor_config.json").write_text(json.dumps(settings))
    model = probes.load(str(checkpoint(name)), device="cpu")
    side = model.geometry.image_px
    for size in SIZES:
        whole = torch.from_numpy(np.array(photo(size))).permute(2, 0, 1)[None] / 255
        small = torch.nn.functional.interpolate(
            whole, (side, side), mode=OF_TORCH[name], antialias=True
        )
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        difference = (model.preprocess(photo(size)) - (small.clamp(0, 1) - mean) / std) * std
        assert difference.abs().max() < 1.1 / 255


def test_another_side_keeps_filter_and_field_of_view_and_squash_the_filter(
    checkpoint,
):
    """224 of 256 px are 448 of 512 px; squash replaces the crop."""
    filter_ = {"resample": BILINEAR}
    settings = _DINOV2.settings | filter_
    StockProcessor("BitImageProcessorPil", settings).build().save_pretrained(checkpoint("dinov2"))
    larger = {
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 32, "width": 32},
    }
    cases = (
        (
            {"image_px": 32},
            StockProcessor("BitImageProcessorPil", larger | filter_),
        ),
        (
            {"image_resize": "squash"},
            StockProcessor("ViTImageProcessorPil", {"size": BOTH_SIDES} | filter_),
        ),
    )
    for options, stock in cases:
        model = probes.load(str(checkpoint("dinov2")), device="cpu", **options)
        for size in SIZES:
            torch.testing.assert_close(model.preprocess(photo(size)), stock.pixels(photo(size)))
    said = "squash, bilinear; it replaces center_crop, bilinear, the middle 24 of 27 px"
    assert said in repr(model)


RULES = {
    "numbers, as files of 2021 have them": (
        {
            "feature_extractor_type": "CLIPFeatureExtractor",
            "size": 256,
            "crop_size": 224,
        },
        ResizeRule("center_crop", before_crop=Fraction(8, 7)),
    ),
    "both sides": (
        {
            "size": {"height": 256, "width": 256},
            "crop_size": 224,
            "do_center_crop": True,
        },
        ResizeRule("squash", before_crop=Fraction(8, 7)),
    ),
    "a class's filter": (
        {"image_processor_type": "ViTImageProcessorFast", "resample": None},
        ResizeRule("squash", BILINEAR),
    ),
    "no class and no filter": ({"do_center_crop": False}, ResizeRule("squash")),
}


@pytest.mark.parametrize("kind", RULES)
def test_files_without_a_setting_have_that_of_their_class(kind, tmp_path):
    settings, expected = RULES[kind]
    means = {"image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | means))
    assert read_image_processors(str(tmp_path), FAMILIES["clip"])[1] == expected
