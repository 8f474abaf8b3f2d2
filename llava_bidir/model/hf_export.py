"""A trained model as a Hugging Face directory: weights, processor, the code it needs, and where it came from."""

import json
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from llava_bidir.common.atomic_io import atomic_directory
from llava_bidir.common.errors import UserError

from .model_card import model_card
from .modeling_llava_bidir import LlavaBidirConfig, LlavaBidirForConditionalGeneration

TRAINING_FACTS = "training.json"
OWN_KEYS = tuple(LlavaBidirConfig.__annotations__)  # what it adds to LlavaConfig


def export_hf(model: PreTrainedModel, processor: LlavaProcessor, out: Path, facts: dict | None = None) -> None:
    """Writes the model to `out` and reads it back to compare; `out` appears whole or not at all.

    Args:
        model: Ours, whose code is copied into the directory for `trust_remote_code` where this package is not
            installed, or what :func:`as_llava` made of it.
        processor: With tokenizer, image processor and chat template.
        out: Replaced if it is an earlier export.
        facts: About the training run; written to training.json and the model card.

    Raises:
        RuntimeError: What was written is not what is in memory.
        UserError: Another process writes `out`, or the operating system refused.
    """
    if isinstance(model, LlavaBidirForConditionalGeneration):
        LlavaBidirConfig.register_for_auto_class()
        LlavaBidirForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    with atomic_directory(out, marker=TRAINING_FACTS) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / TRAINING_FACTS).write_text(json.dumps(facts or {}, indent=1) + "\n")
        (partial / "README.md").write_text(model_card(model.config, facts or {}))
        _compare(model, type(model).from_pretrained(partial, dtype=model.dtype))


def as_llava(model: LlavaBidirForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The same weights in transformers' own class, which is what serving software knows.

    Raises:
        UserError: The model is not causal; the stock class would run it under another mask than it was trained with.
    """
    if model.config.image_attention != "causal":
        raise UserError(
            f"--as-llava: image_attention is {model.config.image_attention!r}, but a stock llava runs causally; export "
            "without it, and load with trust_remote_code"
        )
    if model.config.register_tokens:
        raise UserError("--as-llava: the encoder has register tokens, which a stock llava would take for patches")
    settings = {k: v for k, v in model.config.to_dict().items() if k not in (*OWN_KEYS, "model_type", "auto_map")}
    config = LlavaConfig(**settings, attn_implementation=model.config._attn_implementation)
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration._from_config(config, dtype=model.dtype)
    # module by module: buffers that no checkpoint holds (rotary frequencies, position ids) come along
    stock.model.vision_tower = model.model.vision_tower
    stock.model.multi_modal_projector = model.model.multi_modal_projector
    stock.model.language_model, stock.lm_head = model.model.language_model, model.lm_head
    stock.generation_config = model.generation_config
    return stock.eval()


def _compare(ours: torch.nn.Module, written: torch.nn.Module) -> None:
    """In the dtype that it is read in: a model may have trained with its frozen part in bfloat16."""
    theirs = written.state_dict()
    for name, tensor in ours.state_dict().items():
        if not torch.equal(tensor.to("cpu", theirs[name].dtype), theirs[name]):
            raise RuntimeError(f"export: tensor {name} differs after reading it back")
