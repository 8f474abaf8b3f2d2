"""Random weights in the files in which Vicuna, the three encoders and llava-hf checkpoints are published.

Tensors are cut from one pool of random numbers, since drawing those of a 7B model would take long.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    SiglipConfig,
    SiglipModel,
)
from transformers.convert_slow_tokenizer import import_protobuf

from llava_bidir.common.tokenizer import load_tokenizer
from llava_bidir.model.build import CHAT_TEMPLATE, EXTRA_TOKENS
from llava_bidir.model.llm import VOCABULARY_MULTIPLE

WORDS = 32000  # rows of Llama's vocabulary
SHARDS = 3  # llava-hf/llava-1.5-7b-hf has three
STD = 0.02  # initializer_range of all these models
POOL = 1 << 24


@dataclass(frozen=True)
class Size:
    """Widths and depths of a rehearsal; image and patch sizes are always the published ones.

    Args:
        llm: Settings of LlamaConfig. 7b is Vicuna's, 1b TinyLlama's.
        encoders_shrink: Divisor of the encoders' widths and depths.
        training_images: For the probes, if no other number is asked for; at least one per GPU of a node.
        validation_images: The same, of validation.
    """

    llm: dict[str, int]
    encoders_shrink: int
    training_images: int
    validation_images: int


SIZES = {
    "7b": Size(
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        1,
        training_images=8,
        validation_images=8,
    ),
    "1b": Size(
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
        }
        | {"num_key_value_heads": 4},
        1,
        training_images=8,
        validation_images=8,
    ),
    "tiny": Size(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        16,
        training_images=6,
        validation_images=4,
    ),
}


def vision_settings(name: str, shrink: int) -> dict[str, int]:
    """Return an encoder's sizes. Source: `config.json` of the checkpoints in configs/encoder."""
    width, inner, layers, heads, image_px = {
        "clip": (1024, 4096, 24, 16, 336),
        "dinov2": (1024, 4096, 24, 16, 518),
        "siglip": (1152, 4304, 27, 16, 384),
    }[name]
    settings = {
        "image_size": image_px,
        "patch_size": 14,
        "num_attention_heads": max(heads // shrink, 1),
    }
    settings |= {"hidden_size": width // shrink, "num_hidden_layers": max(layers // shrink, 3)}
    return settings if name == "dinov2" else settings | {"intermediate_size": inner // shrink}


def write_encoder(name: str, shrink: int, out: Path) -> None:
    """Write an encoder in fp32: CLIP and SigLIP with both towers, as they are published, DINOv2 alone."""
    vision = vision_settings(name, shrink)
    if name == "dinov2":
        config = Dinov2Config(**vision)
        model_class = Dinov2Model
    else:
        text = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        }
        if name == "siglip":
            text = {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
            }
        text = {key: max(value // shrink, 1) for key, value in text.items()}
        config_class, model_class = (
            (CLIPConfig, CLIPModel) if name == "clip" else (SiglipConfig, SiglipModel)
        )
        config = config_class(text_config=text, vision_config=vision)
    write_model(model_class, config, torch.float32, out, pickled=name == "clip", shards=1)


def write_vicuna(settings: dict[str, int], out: Path) -> None:
    """Write an LLM as lmsys/vicuna-7b-v1.5: pickled shards in fp16 and a `tokenizer.model` without `tokenizer.json`."""
    write_model(
        LlamaForCausalLM,
        llama_config(settings, WORDS),
        torch.float16,
        out,
        pickled=True,
    )
    write_tokenizer(out)
    sampling = {
        "max_length": 4096,
        "temperature": 0.9,
        "top_p": 0.6,
    }  # without do_sample
    _write_json(
        out / "generation_config.json",
        {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **sampling,
        },
    )


def write_llava_hf(
    settings: dict[str, int],
    shrink: int,
    vicuna: Path,
    out: Path,
) -> None:
    """Write a model as llava-hf/llava-1.5-7b-hf: three fp16 shards with the old names, and `chat_template.json`."""
    rows = math.ceil((WORDS + len(EXTRA_TOKENS)) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision_settings("clip", shrink)),
        text_config=llama_config(settings, rows),
        image_token_index=WORDS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=576,
    )
    write_model(LlavaForConditionalGeneration, config, torch.float16, out, rename=_old_name)
    tokenizer = load_tokenizer("llm", str(vicuna))
    tokenizer.add_tokens(list(EXTRA_TOKENS), special_tokens=True)
    tokenizer.pad_token = "<pad>"
    square = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(**square),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(out)
    _write_json(out / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write_json(
        out / "generation_config.json",
        {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": WORDS + 1,
        },
    )
    shutil.copy(vicuna / "tokenizer.model", out)


def _old_name(name: str) -> str:
    """Return the name that a tensor of a llava model has in published checkpoints."""
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def llama_config(settings: dict[str, int], rows: int) -> LlamaConfig:
    """Return the configuration of an LLM with Vicuna's limits."""
    return LlamaConfig(
        vocab_size=rows,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        **settings,
    )


def write_model(
    model_class: type,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    out: Path,
    *,
    rename: Callable[[str], str] = str,
    pickled: bool = False,
    shards: int = SHARDS,
) -> None:
    """Write `config.json`, and random weights shard by shard, one of them in memory at a time.

    Args:
        model_class: Class of transformers, for names and shapes.
        config: Its configuration.
        dtype: Dtype of the files.
        out: New folder.
        rename: Returns a tensor's published name.
        pickled: Write `pytorch_model*.bin`, else safetensors.
        shards: Number of files.
    """
    out.mkdir(parents=True)
    config.architectures = [model_class.__name__]
    config.dtype = dtype
    config.save_pretrained(out)
    with torch.device("meta"):
        shapes = {
            name: x.shape
            for name, x in model_class(config).state_dict().items()
            if x.is_floating_point()
        }
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    total = sum(shape.numel() for shape in shapes.values())
    done = 0
    shard = {}
    index = {}
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(STD).to(dtype)
    for position, (name, shape) in enumerate(shapes.items()):
        shard[rename(name)] = _random_tensor(name, shape, pool, offset=997 * position)
        done += shape.numel()
        number = len(set(index.values())) + 1
        left = len(shapes) - position - 1
        # no shard remains empty
        is_full = done >= total * number / shards or left == shards - number
        if left and (number == shards or not is_full):
            continue
        file = (
            f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number:05d}-of-{shards:05d}.{suffix}"
        )
        torch.save(shard, out / file) if pickled else save_file(shard, out / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
        shard = {}
    if shards > 1:
        sizes = {"total_size": total * dtype.itemsize}
        _write_json(out / f"{stem}.{suffix}.index.json", {"metadata": sizes, "weight_map": index})


def _random_tensor(
    name: str,
    shape: torch.Size,
    pool: Tensor,
    offset: int,
) -> Tensor:
    """Return ones for scales of norms, zeros for biases, and for matrices the numbers of the pool from `offset` on."""
    if len(shape) < 2:
        return torch.full(
            shape, float(name.endswith("weight") or "scale" in name), dtype=pool.dtype
        )
    end = offset + shape.numel()
    source = pool if end <= POOL else pool.repeat(math.ceil(end / POOL))
    return source[offset:end].view(shape).clone()


def write_tokenizer(out: Path) -> None:
    """Write a `tokenizer.model` of Llama's kind and size. Its pieces are bytes, characters and a few words.

    Text has more tokens than under Llama's vocabulary.
    """
    proto = import_protobuf()
    model = proto.ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.add_dummy_prefix = True
    kinds = model.SentencePiece
    for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(
            piece=piece,
            score=0,
            type=kind,
        )
    for byte in range(256):
        model.pieces.add(
            piece=f"<0x{byte:02X}>",
            score=0,
            type=kinds.BYTE,
        )
    pieces = dict.fromkeys(["▁", *map(chr, range(33, 127))])
    for word in (
        "▁a",
        "th",
        "the",
        "▁the",
        "in",
        "ER",
        "US",
        "USER",
        "▁US",
        "AN",
        "IST",
        "SI",
        "ST",
    ):
        pieces.setdefault(word)
    for piece in pieces:
        model.pieces.add(piece=piece, score=-len(model.pieces))
    while len(model.pieces) < WORDS:  # as many as Llama has; none can result from merges
        model.pieces.add(piece=f"\ue000{len(model.pieces)}", score=-len(model.pieces))
    (out / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "padding_side": "right",
    }
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    _write_json(out / "tokenizer_config.json", settings | special)
    _write_json(out / "special_tokens_map.json", special)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
