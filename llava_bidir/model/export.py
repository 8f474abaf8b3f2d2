"""Export of a model as a Hugging Face directory: weights, processor, model code, training.json and model card."""

import inspect
import json
import runpy
import textwrap
from pathlib import Path

import torch
import transformers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MetaClip2VisionConfig,
    PreTrainedModel,
)

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.files import atomic_directory, to_json
from llava_bidir.common.hf import TRAINING_JSON, is_finite

from . import attention
from .configuration_llava_bidir import LlavaBidirConfig
from .lora import merge_lora
from .modeling_llava_bidir import LlavaBidirForConditionalGeneration, logit_steps, released_names

CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, {attention}-image-attention]
---

# LLaVA-1.5 with {attention} attention among image tokens

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(DIR{remote})
processor = AutoProcessor.from_pretrained(DIR{remote})
```

## Training

{training}

Written by llava-bidir with transformers {version}.
"""


def export_hf(
    model: PreTrainedModel, processor: LlavaProcessor, out: Path, training: dict | None = None
) -> None:
    """Write the model to `out` atomically, after comparing the written weights with those in memory.

    Args:
        model: A `LlavaBidirForConditionalGeneration`, whose code is copied into the directory for `trust_remote_code`,
            or the result of :func:`as_llava`. LoRA updates are added to the weights.
        processor: Tokenizer, image processor and chat template.
        out: Target directory; an earlier export is replaced.
        training: Settings and metrics of the training run, for training.json and the model card.

    Raises:
        RuntimeError: A written tensor differs from the one in memory.
        UserError: A weight is NaN or infinite, a mask that is registered elsewhere cannot be exported, another process
            writes to `out`, or the operating system reported an error.
    """
    training = training or {}
    # no loss shows those that the last step has made
    for name, tensor in model.state_dict().items():
        if not is_finite(tensor):
            raise UserError(
                f"export: {name} is not finite: the training diverged; use an earlier checkpoint"
            )
    with atomic_directory(out, marker=TRAINING_JSON) as partial:
        model = merge_lora(model)
        model.save_pretrained(partial)
        if isinstance(model, LlavaBidirForConditionalGeneration):
            _add_mask(model.config.image_attention, partial / "attention.py")
        else:
            _add_released_rope(partial / "config.json")
        processor.save_pretrained(partial)
        (partial / TRAINING_JSON).write_text(to_json(training))
        (partial / "README.md").write_text(write_card(model.config, training))
        written = type(model).from_pretrained(partial, dtype=model.dtype).state_dict()
        for name, tensor in model.state_dict().items():
            # in the dtype that was read back, since frozen weights may have been bfloat16
            if not torch.equal(tensor.to("cpu", written[name].dtype), written[name]):
                raise RuntimeError(f"export: tensor {name} differs after reading it back")


def write_card(config: LlavaConfig, training: dict) -> str:
    """Return the Markdown of a model's card; `training` lists settings and metrics of its training run."""
    # a path on one machine, and hashes, which training.json has
    left_out = ("checkpoint", "identity")
    facts = [f"- {name}: {value}" for name, value in training.items() if name not in left_out]
    return CARD.format(
        attention=getattr(config, "image_attention", "causal"),
        remote="" if config.model_type == "llava" else ", trust_remote_code=True",
        training="\n".join(facts) or "Not recorded.",
        version=transformers.__version__,
    )


def _add_mask(name: str, file: Path) -> None:
    """Add a mask that is registered outside of attention.py to the copy of it in an export.

    Raises:
        UserError: Its source cannot be found, or needs more than attention.py imports.
    """
    block_ids = attention.block_ids_of(name)
    if block_ids is None or block_ids.__module__ == attention.__name__:
        return
    with error_context(
        f"export: mask {name!r} must be a function that needs nothing but torch and itself"
    ):
        source = textwrap.dedent(inspect.getsource(block_ids))
        with file.open("a") as copy:
            copy.write(
                f"\n\n{source}\n\nregister_image_attention({name!r}, {block_ids.__name__})\n"
            )
        runpy.run_path(str(file))  # registering calls it


def _add_released_rope(file: Path) -> None:
    """Add the keys of rotary positions that released LLaVAs have to the LLM's part of a config.json.

    transformers before 5, and servers that read as it does, ignore `rope_parameters` and would take their defaults.
    """
    config = json.loads(file.read_text())
    llm = config["text_config"]
    parameters = llm.get("rope_parameters") or {}
    scaling = dict(parameters.get("full_attention", parameters))
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in scaling:
            llm[key] = scaling.pop(key)
    if scaling.get("rope_type", "default") != "default":
        llm["rope_scaling"] = scaling
    if "sliding_attention" in parameters:
        llm["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def as_llava(model: LlavaBidirForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Return the same weights in transformers' own LLaVA class, which serving software supports.

    Raises:
        UserError: The stock class would compute something else: the model is not causal, its encoder has registers, or
            its LLM's logits are more than the products of a head without a bias.
    """
    if model.config.image_attention != "causal":
        raise UserError(
            f"--as-llava: image_attention is {model.config.image_attention!r}, but stock LLaVA is causal; export "
            "without --as-llava and load with trust_remote_code"
        )
    if model.config.encoder_norm:
        raise UserError(
            "--as-llava: the adapter reads the encoder's layer after its final norm, which stock LLaVA leaves out; "
            "export without --as-llava and load with trust_remote_code"
        )
    kind = model.config.vision_config.model_type
    if kind == MetaClip2VisionConfig.model_type:
        raise UserError(
            f"--as-llava: stock LLaVA cannot build the encoder {kind}; export without --as-llava and load with "
            "trust_remote_code"
        )
    if model.config.register_tokens:
        raise UserError(
            "--as-llava: the encoder has register tokens, which stock LLaVA would treat as patches"
        )
    text_config = model.config.get_text_config()
    steps = [*logit_steps(text_config)] + ["a bias"] * model.config.lm_head_bias
    if steps:
        raise UserError(
            f"--as-llava: {text_config.model_type} makes its logits with {', '.join(steps)}, which stock LLaVA leaves "
            "out; export without --as-llava and load with trust_remote_code"
        )
    added = (*LlavaBidirConfig.__annotations__, "model_type", "auto_map")
    settings = {k: v for k, v in model.config.to_dict().items() if k not in added}
    config = LlavaConfig(**settings, attn_implementation=model.config._attn_implementation)
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration._from_config(config, dtype=model.dtype)
    # moving modules, not tensors, keeps the buffers that no checkpoint holds (rotary frequencies, position ids)
    stock.model.vision_tower = model.model.vision_tower
    stock.model.multi_modal_projector = model.model.multi_modal_projector
    stock.model.language_model = model.model.language_model
    stock.lm_head = model.lm_head
    stock.generation_config = model.generation_config
    stock._weight_conversions = released_names(stock)
    return stock.eval()
