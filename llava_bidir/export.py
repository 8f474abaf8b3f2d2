"""A trained model as a Hugging Face directory: weights, processor, the code it needs, and where it came from."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import LlavaProcessor

from .modeling import LlavaBidirConfig, LlavaBidirForConditionalGeneration

TRAINING_FACTS = "training.json"


def export_hf(
    model: LlavaBidirForConditionalGeneration, processor: LlavaProcessor, out: Path, facts: dict | None = None
) -> None:
    """Writes the model to `out` and reads it back to compare; `out` appears whole or not at all.

    Args:
        model: Its class is copied into the directory, for `trust_remote_code` where this package is not installed.
        processor: With tokenizer, image processor and chat template.
        out: Replaced if it exists.
        facts: About the training run; written to training.json.

    Raises:
        RuntimeError: What was written is not what is in memory.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    LlavaBidirConfig.register_for_auto_class()
    LlavaBidirForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / TRAINING_FACTS).write_text(json.dumps(facts or {}, indent=1) + "\n")
    _compare(model, LlavaBidirForConditionalGeneration.from_pretrained(partial, dtype=model.dtype))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _compare(ours: torch.nn.Module, written: torch.nn.Module) -> None:
    theirs = written.state_dict()
    for name, tensor in ours.state_dict().items():
        if not torch.equal(tensor.cpu(), theirs[name]):
            raise RuntimeError(f"export: tensor {name} differs after reading it back")


def run(args: argparse.Namespace) -> None:
    """`llava-bidir export`.

    Raises:
        ValueError: The checkpoint is none of `llava-bidir fit`.
    """
    from .training.module import LlavaTraining  # here, for training imports this module

    if not args.checkpoint.is_file():
        raise ValueError(f"no checkpoint {args.checkpoint}; expected RUN/checkpoints/*.ckpt")
    checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    settings = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if not k.startswith("_")}
    if "image_attention" not in settings:
        raise ValueError(f"{args.checkpoint} is no checkpoint of `llava-bidir fit`")
    module = LlavaTraining(**settings)
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    facts = {
        "stage": "+".join(settings["train"]),
        "steps": checkpoint["global_step"],
        "checkpoint": str(args.checkpoint),
    }
    export_hf(module.model, module.processor, args.out, facts)
    print(args.out)
