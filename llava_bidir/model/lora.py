"""LoRA updates of the LLM by peft, and their merging into the weights."""

import copy
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from llava_bidir.common.cli import Count, ShareBelow1

from .modeling_llava_bidir import LlavaBidirForConditionalGeneration

UPDATES = ".lora_"  # substring of the parameter names of updates


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of every linear layer of the LLM except its head.

    Source: LLaVA scripts/v1_5/finetune_lora.sh and train.py:108, find_all_linear_names.

    Args:
        r: Rank.
        alpha: Updates are scaled by alpha / r.
        dropout: Dropout probability of the input of the updates.
    """

    r: Count = 128
    alpha: Count = 256
    dropout: ShareBelow1 = 0.05


def add_lora(model: LlavaBidirForConditionalGeneration, lora: Lora) -> None:
    """Add updates to the linear layers of the LLM, in torch's default dtype; they are zero at first."""
    from peft import LoraConfig, inject_adapter_in_model  # the environment of lmms-eval has none

    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear"
    )
    llm = model.model.language_model  # does not include the head
    # peft converts updates to the dtype of their weights, so weights in another dtype are absent meanwhile
    dtype = torch.get_default_dtype()
    weights = {p: p.data for p in llm.parameters() if p.dtype != dtype}
    for parameter, data in weights.items():
        parameter.data = torch.empty((), dtype=dtype, device=data.device).expand(data.shape)
    inject_adapter_in_model(config, llm)
    for parameter, data in weights.items():
        parameter.data = data


@torch.no_grad()
def merge_lora(model: LlavaBidirForConditionalGeneration) -> LlavaBidirForConditionalGeneration:
    """Return a copy of the model with the updates added to its weights, or the model itself if it has none.

    The given model is unchanged and can continue training. peft adds the updates layer by layer in float32; each sum is
    rounded once, to the dtype of its weight. Layers are merged on the CPU, because a GPU may be full after training and
    would round differently. All other tensors are shared.
    """
    if not has_lora(model):
        return model
    from peft.tuners.lora import LoraLayer

    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    merged = copy.deepcopy(model, shared)
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, LoraLayer):
            dtype = layer.get_base_layer().weight.dtype
            layer = copy.deepcopy(layer).cpu().float()
            layer.merge()
            merged.set_submodule(name, layer.get_base_layer().to(dtype))
    del merged.model.language_model.peft_config
    return merged


def has_lora(model: nn.Module) -> bool:
    """Return True if a layer of the model has low-rank updates."""
    return any(UPDATES in name for name, _ in model.named_parameters())
