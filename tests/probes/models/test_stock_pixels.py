"""Pixels of every family equal those of its stock image processor, with its filter, crop and padding."""

import json
import shutil
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
from llava_bidir.common.errors import UserError
from probes.models.families import FAMILIES
from probes.models.pixels import read_image_processors
from probes.models.read_config import Checkpoint
from probes.ops.geometry import ResizeRule

pytestmark = pytest.mark.usefixtures("small_squares")

SQUARE = (90, 90)
SIZES = (SQUARE, (120, 90), (61, 99))  # width, height
BILINEAR = Image.Resampling.BILINEAR
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
        is_own: It returns what the family's forward takes, of photos in their shape, of which the sites see squares.
    """

    name: str
    settings: dict = field(default_factory=lambda: {"size": BOTH_SIDES})
    view: int = 0
    is_own: bool = False

    def build(self):
        """Return the processor with the means of the tiny models."""
        means = {"image_mean": MEAN, "image_std": STD}
        return getattr(transformers, self.name)(**(means | self.settings))

    def pixels(self, photo: Image.Image) -> torch.Tensor:
        """Return the pixels of the view that the sites see."""
        pixels = torch.as_tensor(np.array(self.build()([[photo]])["pixel_values"]))
        if self.is_own:
            return pixels
        return pixels.reshape(-1, *pixels.shape[-3:])[self.view][None]


def _idefics(name: str, **kwargs) -> StockProcessor:
    sides = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 24}}
    return StockProcessor(name, sides | kwargs, view=-1)


def _patches(name: str, side: int = TOKENS_PX, **kwargs) -> StockProcessor:
    """Return a processor of patches; `size` is the least and the most pixels, of both frames of GLM's."""
    frames = 2 if name.startswith("Glm") else 1
    settings = {
        "patch_size": 2,
        "merge_size": 2,
        "size": dict.fromkeys(("shortest_edge", "longest_edge"), frames * side**2),
    }
    return StockProcessor(name, settings | kwargs, is_own=True)


_TILES = {"image_grid_pinpoints": [[24, 48], [48, 24]]}
_GOT = {"size": BOTH_SIDES, "min_patches": 1, "max_patches": 4}
# as published: the shorter side resized to 256 px, of which 224 are kept
_CROPPED = {"size": {"shortest_edge": 27}, "crop_size": BOTH_SIDES}

# families with one entry (CLIP with one tower and two, for instance) are here once
PROCESSORS = [
    ("llava", StockProcessor("LlavaImageProcessorPil", SHORTER_SIDE | {"do_pad": True})),
    ("llava", StockProcessor("LlavaImageProcessorPil", SHORTER_SIDE)),
    (
        "llava vipllava clip metaclip_2 aimv2_vision_model mlcd_vision_model",
        StockProcessor("CLIPImageProcessorPil", SHORTER_SIDE),
    ),
    ("llava_next", StockProcessor("LlavaNextImageProcessorPil", SHORTER_SIDE | _TILES)),
    (
        "llava_onevision",
        StockProcessor("LlavaOnevisionImageProcessorPil", {"size": BOTH_SIDES} | _TILES),
    ),
    ("deepseek_vl", StockProcessor("DeepseekVLImageProcessorPil")),
    ("janus", StockProcessor("JanusImageProcessorPil")),
    ("gemma3", StockProcessor("Gemma3ImageProcessorPil")),
    ("paligemma siglip", StockProcessor("SiglipImageProcessorPil")),
    (
        "siglip",
        StockProcessor(
            "SiglipImageProcessorPil", {"size": BOTH_SIDES, "resample": Image.Resampling.LANCZOS}
        ),
    ),
    (
        "gemma4",
        StockProcessor(
            "Gemma4ImageProcessorPil",
            {"patch_size": 2, "max_soft_tokens": 70, "do_normalize": True},
            is_own=True,
        ),
    ),
    ("internvl aya_vision qianfan_ocr", StockProcessor("GotOcr2ImageProcessorPil", _GOT)),
    (
        "internvl",
        StockProcessor("GotOcr2ImageProcessorPil", _GOT | {"crop_to_patches": True}, view=-1),
    ),
    ("idefics3", _idefics("Idefics3ImageProcessorPil")),
    ("idefics3", _idefics("Idefics3ImageProcessorPil", do_image_splitting=False)),
    ("smolvlm", _idefics("SmolVLMImageProcessorPil", resample=BILINEAR)),
    ("ovis2", StockProcessor("Ovis2ImageProcessorPil")),
    (
        "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe exaone4_5",
        _patches("Qwen2VLImageProcessorPil"),
    ),
    ("glm4v glm4v_moe glm_ocr", _patches("Glm4vImageProcessorPil")),
    ("glm46v", _patches("Glm46VImageProcessorPil")),
    (
        "mistral3 lighton_ocr",
        StockProcessor(
            "PixtralImageProcessorPil",
            {"size": {"longest_edge": TOKENS_PX}, "patch_size": {"height": 4, "width": 4}},
            is_own=True,
        ),
    ),
    ("paddleocr_vl", _patches("PaddleOCRVLImageProcessorPil")),
    ("video_llama_3", _patches("VideoLlama3ImageProcessorPil", 2 * SIDE, merge_size=1)),
    ("dinov2 dinov2_with_registers pixio", StockProcessor("BitImageProcessorPil", _CROPPED)),
    (
        "siglip2",
        StockProcessor(
            "Siglip2ImageProcessorPil", {"patch_size": 4, "max_num_patches": 36}, is_own=True
        ),
    ),
    ("vit ijepa vit_msn vit_mae", StockProcessor("ViTImageProcessorPil")),
    ("beit data2vec-vision", StockProcessor("BeitImageProcessorPil")),
    (
        "deit",
        StockProcessor(
            "DeiTImageProcessorPil", {"size": {"height": 27, "width": 27}, "crop_size": BOTH_SIDES}
        ),
    ),
]
CASES = [(name, stock) for names, stock in PROCESSORS for name in names.split()]
# Their only processor needs torchvision, whose resize is torch's own with antialias.
OF_TORCH = {
    "dinov3_vit": "bilinear",
    "cohere2_vision": "bicubic",
    "gemma4_unified": "bicubic",
    "lfm2_vl": "bilinear",
    "kimi_k25": "bicubic",
    "tipsv2": "bilinear",
    "sapiens2": "bilinear",
}
# LLaVA's processor; one with tests of its own; one for which transformers has none
WITHOUT = ["llava_bidir", "deepseek_vl_hybrid", "radio"]


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


def test_every_family_has_a_stock_processor_here():
    here = [FAMILIES[name] for name in (*dict(CASES), *OF_TORCH)]
    assert [name for name, family in FAMILIES.items() if family not in here] == WITHOUT


@pytest.mark.parametrize(("name", "stock"), CASES)
def test_pixels_equal_those_of_the_stock_processor(name, stock, checkpoint):
    """The filter, the crop, the padding and the detour over a larger photo are the processor's."""
    stock.build().save_pretrained(checkpoint(name))
    model = probes.load(checkpoint(name), device="cpu")
    for size in [SQUARE] if stock.is_own else SIZES:
        ours = model.preprocess(photo(size))
        if stock.is_own:
            of_llm = (model.model, ours, model.is_image[None]) if model.has_llm else ()
            ours = model.family.inputs(*of_llm or (model.model.config, ours))["pixel_values"]
        expected = stock.pixels(photo(size)).flatten()[: ours.numel()]  # Gemma 4 pads its patches
        torch.testing.assert_close(ours.flatten(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_the_larger_view_equal_those_of_the_stock_processor(size, checkpoint):
    """DeepSeek-VL's SAM; the smaller view is made of it with less than one grey level of difference."""
    folder = checkpoint("deepseek_vl_hybrid")
    stock = tiny_families.stock_hybrid([photo(size)])
    model = probes.load(folder, device="cpu")
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
    model = probes.load(checkpoint(name), device="cpu")
    side = model.geometry.image_px
    for size in SIZES:
        whole = torch.from_numpy(np.array(photo(size))).permute(2, 0, 1)[None] / 255
        small = torch.nn.functional.interpolate(
            whole, (side, side), mode=OF_TORCH[name], antialias=True
        )
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        difference = (model.preprocess(photo(size)) - (small.clamp(0, 1) - mean) / std) * std
        assert difference.abs().max() < 1.1 / 255


def test_another_side_keeps_filter_and_field_of_view_and_squash_the_filter(checkpoint):
    """224 of 256 px are 448 of 512 px; squash replaces the crop."""
    filter_ = {"resample": BILINEAR}
    settings = _CROPPED | filter_
    StockProcessor("BitImageProcessorPil", settings).build().save_pretrained(checkpoint("dinov2"))
    larger = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    both_sides = {"size": BOTH_SIDES} | filter_
    for option, value, stock in (
        ("image_px", 32, StockProcessor("BitImageProcessorPil", larger | filter_)),
        ("image_resize", "squash", StockProcessor("ViTImageProcessorPil", both_sides)),
    ):
        model = probes.load(checkpoint("dinov2"), device="cpu", **{option: value})
        for size in SIZES:
            torch.testing.assert_close(model.preprocess(photo(size)), stock.pixels(photo(size)))


RULES = {
    "numbers, as files of 2021 have them": (
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 256, "crop_size": 224},
        ResizeRule("center_crop", before_crop=Fraction(8, 7)),
    ),
    "both sides": (
        {"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True},
        ResizeRule("squash", before_crop=Fraction(8, 7)),
    ),
    "a class's filter": (
        {"image_processor_type": "ViTImageProcessorFast", "resample": None},
        ResizeRule("squash", BILINEAR),
    ),
    "no class and no filter": ({"do_center_crop": False}, ResizeRule("squash")),
}


def test_padding_is_the_mean_of_pixels_of_any_range(checkpoint, tmp_path):
    """As 0 to 255, which a file says by `do_rescale`; means above white would make it white."""
    folder = shutil.copytree(checkpoint("llava"), tmp_path / "hf")
    file = folder / "preprocessor_config.json"
    means = {"image_mean": MEAN, "image_std": STD}
    of_255 = {key: [255 * x for x in values] for key, values in means.items()}
    wide = Image.new("RGB", (40, 8), "black")
    pixels = []
    for settings in (means, of_255 | {"do_rescale": False}):
        file.write_text(json.dumps(settings))
        model = probes.load(folder, image_resize="pad", device="cpu")
        pixels.append(model.preprocess(wide))
        assert pixels[-1][0, :, 0, 0].abs().max() <= 1 / 255 / min(STD)
    torch.testing.assert_close(*pixels)
    file.write_text(json.dumps(of_255))
    with pytest.raises(UserError, match="not above that of white, 1"):
        probes.load(folder)


@pytest.mark.parametrize("kind", RULES)
def test_files_without_a_setting_have_that_of_their_class(kind, tmp_path):
    settings, expected = RULES[kind]
    means = {"image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | means))
    assert read_image_processors(Checkpoint(str(tmp_path), FAMILIES["clip"]))[1] == expected
