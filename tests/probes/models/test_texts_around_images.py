"""The text before the image and around its tokens: that of stock processors, of templates, and of users."""

import importlib
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import probe_runs
import pytest
import tiny_families
import torch
import transformers
from PIL import Image
from tiny_families import IMAGE_ID, STOCK
from transformers.processing_utils import ProcessorMixin

from probes.models.families import FAMILIES
from probes.models.prompts import read_prefix_ids
from probes.models.read_config import Checkpoint

pytestmark = pytest.mark.usefixtures("small_squares")

PIXELS = {"height": 24, "width": 24}
# whose texts are not made by one method: image processor, settings, and names of tokens that published tokenizers have
PROCESSORS = {
    "gemma3": (
        "Gemma3ImageProcessorPil",
        {"image_seq_length": 9},
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image>"},
    ),
    "paligemma": ("SiglipImageProcessorPil", {}, {"image_token": "<image>"}),
}


def stock_processor(name: str) -> type:
    """Return the class of a family's processor; Mistral 3 has Pixtral's."""
    kind = "pixtral" if name == "mistral3" else name
    module = importlib.import_module(f"transformers.models.{kind}.processing_{kind}")
    own = FAMILIES[name].model_class.replace("ForConditionalGeneration", "Processor")
    return getattr(module, "PixtralProcessor" if name == "mistral3" else own)


@pytest.mark.parametrize("name", PROCESSORS)
def test_ids_of_a_question_equal_those_of_the_stock_processor(name, load_family, monkeypatch):
    """All but the image tokens, whose id is another one in the tiny models."""
    monkeypatch.setattr(  # it asks for classes that need torchvision
        ProcessorMixin, "check_argument_for_proper_class", lambda self, name, argument: None
    )
    mllm = load_family(name)
    asked = [*mllm.ids[0].tolist(), *mllm.chat.question_ids("hello")]
    kind, settings, tokens = PROCESSORS[name]
    tokenizer = tiny_families.tokenizer()
    for attribute, token in tokens.items():
        setattr(tokenizer, attribute, token)
        setattr(tokenizer, f"{attribute}_id", tokenizer.convert_tokens_to_ids(token))
    images = getattr(transformers, kind)(size=PIXELS)
    images.image_seq_length = 36  # as published configs have it; PaliGemma's processor wants it
    processor = stock_processor(name)(images, tokenizer, **settings)
    text = "<image>hello" if name == "paligemma" else "<s>hello<start_of_image>hellohello"
    photo = Image.fromarray(np.zeros((24, 24, 3), np.uint8))
    stock_ids = processor(images=[photo], text=[text], add_special_tokens=False)["input_ids"][0]
    image = tokenizer.convert_tokens_to_ids("<image>")
    theirs = [int(number) for number in stock_ids]
    assert [x for x in theirs if x != image] == [x for x in asked if x != IMAGE_ID]
    assert image in theirs


# Of the same processor; of LLaVA-NeXT and OneVision, of the full view, which tiles follow in theirs.
OF_ANOTHER = {
    **dict.fromkeys(("vipllava", "llava_next", "llava_onevision"), "llava"),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), "qwen3_vl"),
    "glm4v_moe": "glm4v",
    "glm_ocr": "glm46v",
}
WITH_A_METHOD = sorted({*STOCK} - {*PROCESSORS, *OF_ANOTHER})
# Attributes that processors take from the published tokenizers.
COHERE = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>")
GEMMA4 = {"boi_token": "<|image>", "eoi_token": "<image|>"}
TOKENS = {
    "cohere2_vision": dict(
        zip(("boi_token", "eoi_token", "img_line_break_token"), COHERE, strict=True)
    ),
    "gemma4": GEMMA4,
    "gemma4_unified": GEMMA4,
    "mistral3": {"image_end_token": "[IMG_END]", "image_break_token": "[IMG_BREAK]"},
    "lfm2_vl": {"image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"},
}
OTHERS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "start_of_img_token": "<|START_OF_IMG|>",
    "end_of_img_token": "<|END_OF_IMG|>",
    "img_patch_token": "I",
    "tile_token": "TILE",
    "tile_global_token": "TILE_GLOBAL",
    "image_start_token": "<begin_of_image>",
    "image_end_token": "<end_of_image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_tag": "<global-img>",
    "global_image_token": "<global-img>",
    "image_token": "I",
    "image_processor": SimpleNamespace(merge_size=1),
}


class Settings(SimpleNamespace):
    """What a processor knows; numbers are 1."""

    def __getattr__(self, name):
        return 1


def one_image() -> dict:
    """Return what image processors say of a photo of 2 x 2 tokens without tiles."""
    return {
        "num_patches": [1],
        "pixel_values": torch.zeros(1, 3, 2, 2),
        "grids": torch.tensor([[1, 1]]),
        "rows": [[0]],
        "cols": [[0]],
        "image_sizes": [(2, 2)],
        "num_soft_tokens_per_image": [2],
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }


@pytest.mark.parametrize("name", WITH_A_METHOD)
def test_texts_around_the_image_are_those_of_the_stock_processor(name, monkeypatch):
    """By the method that inserts them, of processors that need torchvision, too."""
    if (
        name == "mistral3"
    ):  # imports a function, not used here, from a module that needs torchvision
        resizing = SimpleNamespace(get_resize_output_image_size=None)
        path = "transformers.models.pixtral.image_processing_pixtral"
        monkeypatch.setitem(sys.modules, path, resizing)
    processor = stock_processor(name)
    processor_self = Settings(**OTHERS | TOKENS.get(name, {}))
    if name == "lfm2_vl":
        text = processor._build_image_tokens(processor_self, 1, 1, 2, 2, True, True)
    else:
        text = processor.replace_image_token(processor_self, one_image(), 0)
    family = FAMILIES[name]
    texts = family.image_start_text, family.row_separator or "", family.image_end_text
    start, separator, end = map(re.escape, texts)
    assert re.fullmatch(f"{start}(I|<IMG_ATOM>)+({separator}I+)*{end}", text), text


def test_families_with_the_processor_of_another_have_its_texts():
    for name, other in OF_ANOTHER.items():
        for text in ("image_start_text", "image_end_text"):
            assert getattr(FAMILIES[name], text) == getattr(FAMILIES[other], text)


def test_the_named_template_default_is_used(tmp_path):
    llava = tiny_families.write("llava", tmp_path)
    (llava / "additional_chat_templates").mkdir()
    (llava / "additional_chat_templates/tool_use.jinja").write_text("{{ bos_token }}sky<image>")
    ids = [tiny_families.WORDS[word] for word in ("<s>", "hello")]
    assert read_prefix_ids(Checkpoint(str(llava), FAMILIES["llava"])) == ids


def test_a_prefix_is_part_of_the_run_and_used_by_analyses(checkpoints, segmentation, tmp_path):
    """A checkpoint without a chat template is probed with the text that the error asks for."""
    model = shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    (model / "chat_template.jinja").unlink()
    words = [model, segmentation, tmp_path / "run", "--model.sites=[layer_02]"]
    with pytest.raises(SystemExit, match="has no chat template.* `probes fit --model.prefix`"):
        probe_runs.fit(*words)
    run = probe_runs.fit(*words, "--model.prefix", "USER: sky")
    assert run.manifest["identity"]["settings"]["model.prefix"] == "USER: sky"
    assert run.mllm().prefix_ids.shape[1] > 1
