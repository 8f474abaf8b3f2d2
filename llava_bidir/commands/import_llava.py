"""Checkpoints of LLaVA's own code (haotian-liu/LLaVA), read as models of ours."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import LlavaProcessor

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import error_context, read_json
from llava_bidir.model.build import build_model, build_processor, read_tensors
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration

PROJECTOR = "model.mm_projector."
LAYERS = {"0": "linear_1", "2": "linear_2"}  # of nn.Sequential(Linear, GELU, Linear)
# What LLaVA-1.5 has; of anything else we would make another model than it is.
EXPECTED = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad"}


def is_original(directory: Path) -> bool:
    """Whether LLaVA's own code wrote it."""
    config = directory / "config.json"
    return config.is_file() and "mm_projector_type" in read_json(config)


def read_original(
    directory: Path, encoder: str | None = None
) -> tuple[LlavaBidirForConditionalGeneration, LlavaProcessor, dict]:
    """The model, its processor and what is known of its making.

    Args:
        directory: For instance a local copy of liuhaotian/llava-v1.5-7b.
        encoder: Directory or hub id of its CLIP; None takes the one that its config names.

    Raises:
        UserError: It is no LLaVA-1.5, or has no adapter.
    """
    config = read_json(directory / "config.json")
    for key, expected in EXPECTED.items():
        if config.get(key) != expected:
            raise UserError(f"{directory}: {key} is {config.get(key)!r}; LLaVA-1.5 has {expected!r}")
    with error_context(directory / "config.json"):
        clip = Encoder("clip", encoder or config["mm_vision_tower"], config["mm_vision_select_layer"])
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(config.get("torch_dtype"), torch.float32)
    with _as_llama(directory, config) as llm:
        processor = build_processor(clip, llm)
        model = build_model(clip, llm, processor, dtype=dtype)
    with error_context(f"the adapter of {directory}"):
        model.model.multi_modal_projector.load_state_dict(_adapter(directory))
    return model, processor, {"source": str(directory), "encoder": asdict(clip)}


@contextmanager
def _as_llama(directory: Path, config: dict) -> Iterator[str]:
    """The same files with the config of a plain Llama, whose class then takes its own weights from among them."""
    with TemporaryDirectory() as plain:
        for file in directory.iterdir():
            if file.name != "config.json":
                (Path(plain) / file.name).symlink_to(file.resolve())
        llama = {k: v for k, v in config.items() if not k.startswith("mm_")}
        llama |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (Path(plain) / "config.json").write_text(json.dumps(llama))
        yield plain


def _adapter(directory: Path) -> dict[str, Tensor]:
    """Weights of the adapter, under our names."""
    found = {}
    for name, tensor in read_tensors(directory, PROJECTOR).items():
        layer, _, kind = name.removeprefix(PROJECTOR).partition(".")
        found[f"{LAYERS[layer]}.{kind}"] = tensor
    if len(found) != 4:
        raise UserError(f"{directory} has {len(found)} of the adapter's 4 tensors {PROJECTOR}*")
    return found
