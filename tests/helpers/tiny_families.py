"""Tiny random models of other labs' classes, as checkpoints on disk, and the inputs of their stock forward.

A `Stock` states independently what the package must find out by itself, with module paths and stock image processors.
Texts around the image are the family's, which test_texts_around_images.py compares with stock processors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tiny_encoders import MEAN, STD, cut, patchified, rows_of_pixels
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, CLIPImageProcessorPil, PreTrainedTokenizerFast

from probes.models.families import FAMILIES

VOCABULARY = 128
SIDE = 8  # tokens per side in families that accept images of any size
IMAGE_ID = 99
SEVERAL_WAYS_IN = ("gemma4", "qwen3_vl", "qwen3_vl_moe")  # hooks at early layers are refused
HIGH_MEAN = [0.1, 0.2, 0.3]
HIGH_STD = [0.9, 0.8, 0.7]
# as special tokens, words survive whatever pre-tokenizer a family's own class brings
SPECIAL = (
    """
<IMG_START> <IMG_GRID> <IMG_END> <image> <image_placeholder> <begin_of_image> <start_of_image> <end_of_image>
<IMG_CONTEXT> <img> </img> <|image_start|> <|image_end|> <|media_pad|> <fake_token_around_image> <global-img>
<|START_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|> <|END_OF_IMG|> TILE_GLOBAL <|image_pad|> <|image|> <|image> <image|>
[IMG] [IMG_BREAK] [IMG_END] hello sky wall road
""".split()
    + ["\n\n", "\n"]
)
QUESTION = "{% if messages[0]['content'] | length > 1 %}{{ messages[0]['content'][1]['text'] }}hello{% endif %}"
WORDS = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *SPECIAL])}
LLM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# one for all encoders, which leave out what they do not know
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "head_dim": 8,
    "out_hidden_size": 32,
    "projection_dim": 32,
    "num_position_embeddings": 16,
    "image_size": 24,
    "patch_size": 4,
}
SMALL_PATCHES = VISION | {"patch_size": 2, "image_size": 4 * SIDE}
WINDOWS = SMALL_PATCHES | {"window_size": 16, "fullatt_block_indexes": [1]}
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
CLIP = VISION | {"model_type": "clip_vision_model"}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _normalised(images: list[Image.Image]) -> dict:
    return dict(
        _processor(CLIPImageProcessorPil, do_center_crop=False)(images, return_tensors="pt")
    )


def _processor(kind, **kwargs):
    return kind(do_resize=False, image_mean=MEAN, image_std=STD, **kwargs)


def _stock(name: str, **kwargs) -> Callable:
    """Inputs from the family's own image processor."""

    def inputs(images: list[Image.Image]) -> dict:
        processor = _processor(getattr(transformers, name), **kwargs)
        return dict(processor(images, return_tensors="pt"))

    return inputs


def _tiles(images: list[Image.Image]) -> dict:
    """The full view and two different tiles, as the first pinpoint (1 x 2) has."""
    full = _normalised(images)["pixel_values"]
    views = torch.stack([full, full.flip(-1), full * 0.5], 1)
    return {"pixel_values": views, "image_sizes": torch.tensor([[24, 48]] * len(images))}


def _gemma4(images: list[Image.Image]) -> dict:
    """Padded with patches at (-1, -1), as the stock processor does."""
    inputs = _stock("Gemma4ImageProcessorPil", patch_size=2, max_soft_tokens=70, do_normalize=True)(
        images
    )
    return {key: inputs[key] for key in ("pixel_values", "image_position_ids")}


def _gemma4_unified(images: list[Image.Image]) -> dict:
    """The pixels of each token, row by row, channels last; the stock processor needs torchvision."""
    places = torch.tensor([[column, row] for row in range(SIDE) for column in range(SIDE)])
    return {
        "pixel_values": rows_of_pixels(cut(_normalised(images)["pixel_values"], 6)),
        "image_position_ids": places.expand(len(images), -1, -1),
    }


def _raster(images: list[Image.Image]) -> dict:
    """Patches of 2 x 2 pixels, row by row."""
    patches = torch.stack(cut(_normalised(images)["pixel_values"], 2), 1)
    side = round(patches.shape[1] ** 0.5)
    return {
        "pixel_values": patches.flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(images)),
    }


def _unmerged(images: list[Image.Image]) -> dict:
    inputs = _raster(images)
    ones = torch.ones(len(images), dtype=torch.long)
    return inputs | {"pixel_values": inputs["pixel_values"].flatten(1), "image_merge_sizes": ones}


def _sizes(images: list[Image.Image]) -> dict:
    return _normalised(images) | {
        "image_sizes": torch.tensor([[i.height, i.width] for i in images])
    }


def stock_hybrid(images: list[Image.Image]) -> dict:
    """DeepSeek-VL's two resolutions by its own processor."""
    processor = transformers.DeepseekVLHybridImageProcessorPil(
        size={"height": 16, "width": 16},
        high_res_size={"height": 128, "width": 128},
        image_mean=MEAN,
        image_std=STD,
        high_res_image_mean=HIGH_MEAN,
        high_res_image_std=HIGH_STD,
    )
    return dict(processor(images, return_tensors="pt"))


def hybrid_inputs(images: list[Image.Image]) -> dict:
    """The same, without the rounding of the smaller one to 8 bits."""
    inputs = stock_hybrid(images)
    whole = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in images]).permute(
        0, 3, 1, 2
    )
    small = torch.nn.functional.interpolate(whole / 255, (16, 16), mode="bicubic", antialias=True)
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    return inputs | {"pixel_values": (small - mean) / std}


@dataclass(frozen=True)
class Stock:
    """Expected properties of a family.

    Args:
        config: Of a tiny model.
        encoder: Path of the module whose input is the encoder's states.
        grid: Rows and columns of image tokens.
        image_px: Side of the input.
        inputs: PIL images of that side -> arguments of the stock forward.
        decoder: Path of the LLM.
        norm: Its norm after the last layer.
        placeholder: The image in the template.
        extra: Image tokens of the stock forward after those of the full view.
        native: Mask among image tokens.
        types: Name of the token types' argument, value of an image's tokens, and of other ones.
        masks: Whether all its layers take masks.
    """

    config: dict
    encoder: str
    grid: tuple[int, int] = (6, 6)
    image_px: int = 24
    inputs: Callable = _normalised
    decoder: str = "model.language_model"
    norm: str = "norm"
    placeholder: str = "<image>"
    extra: int = 0
    native: str = "causal"
    types: tuple[str, int, int] | None = None
    masks: bool = True


def _llm(kind: str, **kwargs) -> dict:
    return {"model_type": kind, **LLM, **kwargs}


def _config(kind: str, vision: dict, text: dict, **kwargs) -> dict:
    return {
        "model_type": kind,
        "vision_config": vision,
        "text_config": text,
        "image_token_id": IMAGE_ID,
        "image_token_index": IMAGE_ID,  # as some name it
        **kwargs,
    }


def _patched(
    kind: str, encoder: str, vision: dict, text: dict, placeholder: str = "<|image_pad|>", **kwargs
) -> Stock:
    """Encoders that take patches."""
    name = "Glm4vImageProcessorPil" if kind.startswith("glm") else "Qwen2VLImageProcessorPil"
    text = {"model_type": f"{kind}_text", **LLM, "rope_parameters": MROPE, **text}
    config = _config(kind, {"model_type": kind, **vision}, text)
    inputs = _stock(name, patch_size=2, merge_size=2, temporal_patch_size=2)
    settings = {"types": ("mm_token_type_ids", 1, 0), "placeholder": placeholder, "inputs": inputs}
    return Stock(
        config=config, encoder=encoder, grid=(SIDE, SIDE), image_px=4 * SIDE, **settings | kwargs
    )


def _glm(kind: str, text: dict, **vision) -> Stock:
    return _patched(
        kind,
        encoder="model.visual.downsample",
        vision=SMALL_PATCHES | vision,
        text=text,
        placeholder="<|image|>",
    )


def _pixtral(kind: str, text: dict, encoder: str, placeholder: str) -> Stock:
    vision = SMALL_PATCHES | {"model_type": "pixtral"}
    return Stock(
        _config(kind, vision, text, spatial_merge_size=2),
        f"{encoder}.patch_merger.merging_layer",
        (SIDE, SIDE),
        4 * SIDE,
        inputs=_sizes,
        placeholder=placeholder,
    )


def _internvl(kind: str, text: dict) -> Stock:
    vision = VISION | {"model_type": f"{kind}_vision"}
    return Stock(
        _config(kind, vision, text, image_seq_length=9),
        PROJECTOR,
        (3, 3),
        placeholder="<IMG_CONTEXT>",
    )


def _idefics(kind: str) -> Stock:
    vision = VISION | {"model_type": f"{kind}_vision", "patch_size": 2}
    processor = _stock(
        "Idefics3ImageProcessorPil", do_image_splitting=False, max_image_size={"longest_edge": 24}
    )
    return Stock(
        _config(kind, vision, _llm("llama"), scale_factor=3),
        "model.connector.modality_projection",
        (4, 4),
        inputs=lambda images: processor([[image] for image in images]),
        decoder="model.text_model",
    )


def _tiled(kind: str, vision: dict, text: dict) -> Stock:
    pinpoints = [[24, 48], [48, 24]]
    return Stock(
        _config(kind, vision, text, image_grid_pinpoints=pinpoints),
        PROJECTOR,
        inputs=_tiles,
        extra=6 * 13,
    )


def _cohere(kind: str, placeholder: str) -> Stock:
    text = _llm("cohere2", **GEMMA)
    config = _config(kind, SIGLIP, text, downsample_factor=2, alignment_intermediate_size=32)
    return Stock(config, f"{PROJECTOR}.linear_1", (3, 3), placeholder=placeholder)


GEMMA = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 5,
}
GEMMA4 = (
    LLM
    | GEMMA
    | {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "use_bidirectional_attention": "vision",
        "global_head_dim": 8,
    }
)
GEMMA4_TOKENS = {
    "audio_config": None,
    "video_token_id": 96,
    "audio_token_id": 95,
    "boi_token_id": 94,
}
PROJECTOR = "model.multi_modal_projector"
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
    "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
}
LATENT = {
    "head_dim": 4,  # of the positions
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
EXPERTS = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SAM = {
    "model_type": "sam_vision_model",
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 128,
    "patch_size": 8,
    "window_size": 4,
    "mlp_dim": 32,
    "global_attn_indexes": [1],
    "num_pos_feats": 8,
}
DEEPSEEK = {"encoder": "model.aligner", "placeholder": "<image_placeholder>"}
MERGER = "model.visual.merger"

_ALL = [
    Stock(_config("llava", CLIP, _llm("llama"), image_seq_length=36), PROJECTOR),
    Stock(
        _config(
            "vipllava",
            CLIP,
            _llm("llama"),
            image_seq_length=36,
            vision_feature_layers=[-1, -2],
            vision_feature_layer=[-1, -2],
        ),
        PROJECTOR,
    ),
    _tiled("llava_next", CLIP, _llm("mistral", sliding_window=None)),
    _tiled("llava_onevision", SIGLIP, _llm("qwen2")),
    Stock(_config("deepseek_vl", SIGLIP, _llm("llama")), **DEEPSEEK),
    Stock(
        _config(
            "deepseek_vl_hybrid",
            SIGLIP | {"image_size": 16},
            _llm("llama"),
            high_res_vision_config=SAM,
        ),
        grid=(4, 4),
        image_px=128,
        inputs=hybrid_inputs,
        **DEEPSEEK,
    ),
    Stock(
        _config(
            "janus",
            VISION | {"mlp_ratio": 2.0},
            _llm("llama"),
            vq_config={
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_embeddings": 8,
                "num_res_blocks": 1,
            },
        ),
        **DEEPSEEK,
    ),
    _internvl("internvl", _llm("qwen2")),
    _internvl("qianfan_ocr", _llm("qwen3")),
    Stock(
        _config(
            "lfm2_vl",
            VISION | {"model_type": "siglip2_vision_model", "num_patches": 36},
            _llm("lfm2", layer_types=["conv", "full_attention", "conv"]),
            projector_hidden_size=24,
        ),
        f"{PROJECTOR}.layer_norm",
        (3, 3),
        inputs=lambda images: patchified(_normalised(images)["pixel_values"]),
        norm="embedding_norm",
        masks=False,
    ),
    _idefics("idefics3"),
    _idefics("smolvlm"),
    _cohere("aya_vision", "<image>"),
    _cohere("cohere2_vision", "<|IMG_PATCH|>"),
    Stock(
        _config(
            "ovis2",
            VISION | {"vocab_size": 40, "hidden_stride": 2},
            _llm("qwen2"),
            visual_indicator_token_ids=[
                *map(WORDS.get, ("<IMG_START>", "<IMG_END>", "<IMG_GRID>")),
                *(122, 123),  # for tiles
            ],
            vocab_size=VOCABULARY,
            hidden_size=32,
        ),
        "model.vision_tower.head_linear",
        (3, 3),
    ),
    Stock(
        _config("gemma3", SIGLIP, _llm("gemma3_text", **GEMMA), mm_tokens_per_image=9),
        f"{PROJECTOR}.mm_soft_emb_norm",
        (3, 3),
        placeholder="<start_of_image>",
        native="bidirectional",
        types=("token_type_ids", 1, 0),
    ),
    Stock(
        _config(
            "gemma4",
            vision=SMALL_PATCHES | {"num_key_value_heads": 2},
            text=GEMMA4
            | {
                "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
            },
            **GEMMA4_TOKENS,
        ),
        "model.embed_vision.embedding_projection",
        (SIDE, SIDE),
        SIDE * 6,
        inputs=_gemma4,
        placeholder="<|image|>",
        native="bidirectional_sliding",
        types=("mm_token_type_ids", 1, 0),
    ),
    Stock(
        _config(
            "gemma4_unified",
            vision={
                "model_type": "gemma4_unified_vision",
                "patch_size": 2,
                "mm_embed_dim": 24,
                "output_proj_dims": 24,
            },
            # more than there are tokens, as in the published models
            text=GEMMA4 | {"sliding_window": 128},
            **GEMMA4_TOKENS,
        ),
        "model.embed_vision.multimodal_embedder",
        (SIDE, SIDE),
        SIDE * 6,
        inputs=_gemma4_unified,
        placeholder="<|image|>",
        native="bidirectional",
        types=("mm_token_type_ids", 1, 0),
    ),
    Stock(
        _config("paligemma", SIGLIP, _llm("gemma"), projection_dim=32, hidden_size=32),
        PROJECTOR,
        native="prefix",
        types=("token_type_ids", 0, 1),
    ),
    _patched(
        "qwen2_vl",
        encoder=f"{MERGER}.mlp",
        vision=SMALL_PATCHES | {"embed_dim": 16, "hidden_size": 32},
        text={},
    ),
    _patched("qwen2_5_vl", encoder=f"{MERGER}.mlp", vision=WINDOWS, text={}),
    _patched(
        "qwen3_vl",
        encoder=f"{MERGER}.linear_fc1",
        vision=SMALL_PATCHES | {"deepstack_visual_indexes": [0], "depth": 3},
        text={},
    ),
    _patched(
        "qwen3_vl_moe",
        encoder=f"{MERGER}.linear_fc1",
        vision=SMALL_PATCHES | {"deepstack_visual_indexes": [0]},
        text=EXPERTS,
    ),
    _patched("qwen3_5", f"{MERGER}.linear_fc1", SMALL_PATCHES, LINEAR, masks=False),
    _patched(
        "qwen3_5_moe",
        f"{MERGER}.linear_fc1",
        SMALL_PATCHES,
        LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16},
        masks=False,
    ),
    _glm("glm4v", {}),
    _glm("glm46v", {"model_type": "glm4v_text"}, model_type="glm4v_vision"),
    _glm("glm_ocr", {}, model_type="glm_ocr_vision"),
    _glm(
        "glm4v_moe",
        EXPERTS | {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
        model_type="glm4v_moe_vision",
    ),
    _patched(
        "paddleocr_vl",
        "model.projector.pre_norm",
        SMALL_PATCHES | {"model_type": "paddleocr_vl_vision"},
        {"head_dim": 8},
        inputs=_raster,
    ),
    Stock(
        _config(
            "kimi_k25",
            SMALL_PATCHES
            | {"model_type": "kimi_k25_vision", "pos_emb_height": 16, "pos_emb_width": 16},
            _llm("deepseek_v3", **LATENT, **EXPERTS),
            projection_hidden_size=16,
        ),
        "model.mm_projector",
        (SIDE, SIDE),
        4 * SIDE,
        inputs=_raster,
        placeholder="<|media_pad|>",
    ),
    _patched(
        "exaone4_5",
        f"{MERGER}.mlp",
        WINDOWS | {"model_type": "exaone4_5_vision", "num_key_value_heads": 1},
        {"model_type": "exaone4", "rope_parameters": None, **GEMMA},
        types=None,
    ),
    Stock(
        _config(
            "video_llama_3", SMALL_PATCHES | {"model_type": "video_llama_3_vision"}, _llm("qwen2")
        ),
        "model.projector",
        (SIDE, SIDE),
        2 * SIDE,
        inputs=_unmerged,
        placeholder="<|image_pad|>",
    ),
    _pixtral(
        "mistral3",
        text=_llm("mistral", sliding_window=None),
        encoder=PROJECTOR,
        placeholder="[IMG]",
    ),
    _pixtral(
        "lighton_ocr",
        text=_llm("qwen3"),
        encoder="model.vision_projection",
        placeholder="<|image_pad|>",
    ),
]
STOCK = {stock.config["model_type"]: stock for stock in _ALL}


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("hello", "isolated")
    built = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    built.add_special_tokens({"additional_special_tokens": SPECIAL})
    return built


def build(name: str, attention: str = "sdpa", **text):
    """A random stock model whose attention is far from uniform; `text` are other settings of its LLM."""
    settings = dict(STOCK[name].config)
    settings["text_config"] = settings["text_config"] | text
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = FAMILIES[name].model_cls._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = (
                    12.0 if ".layers." in parameter_name and "language" in parameter_name else 4.0
                )
                parameter.copy_(torch.randn_like(parameter) * 0.02 * scale)
    return model


def write(name: str, folder: Path, attention: str = "sdpa", **text) -> Path:
    """A checkpoint of :func:`build` as the hub has it."""
    build(name, attention, **text).save_pretrained(folder)
    words = tokenizer()
    words.chat_template = "{{ bos_token }}hello" + STOCK[name].placeholder + QUESTION
    words.save_pretrained(folder)
    settings = {
        "image_mean": MEAN,
        "image_std": STD,
        "high_res_image_mean": HIGH_MEAN,
        "high_res_image_std": HIGH_STD,
    }
    CLIPImageProcessorPil(**settings).save_pretrained(folder)
    return folder


def asked_ids(
    name: str, question: Sequence[int] = (), answer: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Return the ids of a question about an image, long[N], and its tokens of the full view, bool[N].

    The template says "hello" before the image and after the question.
    """
    family = FAMILIES[name]
    texts = ["<s>hello" + family.image_start_text, family.image_end_text, "hello"]
    if family.own_template:  # PaliGemma's
        texts = ["", "<s>", "\n"]
    encode = partial(tokenizer().encode, add_special_tokens=False)
    before, after, end = map(encode, texts)
    separator = encode(family.row_separator or "")
    rows, columns = STOCK[name].grid
    image = ([IMAGE_ID] * columns + separator) * rows
    image = image[: len(image) - len(separator)] + [IMAGE_ID] * STOCK[name].extra
    ids = torch.tensor([*before, *image, *after, *question, *end, *answer])
    is_image = ids == IMAGE_ID
    is_image[len(before) + len(image) - STOCK[name].extra :] = False
    return ids, is_image


def layer_depth(name: str) -> int:
    """Return the depth of an LLM layer: linear attention adds a sum in series per token; a layer has eight others."""
    return 1 if STOCK[name].masks else 1 + len(asked_ids(name)[0]) // 8


def stock_inputs(
    name: str, images: Sequence[Image.Image], ids: Tensor, answer: int | None = None
) -> dict:
    """Return the arguments of the stock forward about each image.

    Args:
        name: The family.
        images: B images.
        ids: long[N].
        answer: Number of its last tokens that are an answer; None for all after the image.
    """
    stock = STOCK[name]
    arguments = {"input_ids": ids.expand(len(images), -1), **stock.inputs(list(images))}
    if stock.types:
        key, of_image, of_text = stock.types
        types = torch.where(ids == IMAGE_ID, of_image, of_text)
        if stock.native == "prefix" and answer is not None:  # of the question, too
            types[: len(ids) - answer] = of_image
        arguments[key] = types.expand(len(images), -1)
    return arguments


def pictures(name: str, count: int = 2) -> list[Image.Image]:
    """Return pictures of random pixels, of the side that a family reads."""
    shape = (count, *[STOCK[name].image_px] * 2, 3)
    return [*map(Image.fromarray, np.random.default_rng(0).integers(0, 255, shape, np.uint8))]
