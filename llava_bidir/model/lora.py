"""Low-rank updates of the LLM (LoRA) through peft, and their merging into its weights."""

import copy
from dataclasses import dataclass
from itertools import chain

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from .modeling_llava_bidir import LlavaBidirForConditionalGeneration

NAME = "default"  # peft's name of the only set of updates
UPDATES = ".lora_"  # is part of the names of their weights


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of every linear layer of the LLM but its head. Source: LLaVA scripts/v1_5/finetune_lora.sh and
    train.py:108, find_all_linear_names.

    Args:
        r: Rank.
        alpha: The updates are scaled by alpha / r.
        dropout: Of what goes into them.
    """

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05


def add_lora(model: LlavaBidirForConditionalGeneration, lora: Lora) -> None:
    """Puts updates, zero at first, beside the linear layers of the LLM. They are drawn and kept in its dtype."""
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear")
    inject_adapter_in_model(config, model.model.language_model, NAME)  # the head is not inside of it


@torch.no_grad()
def merge_lora(model: LlavaBidirForConditionalGeneration) -> LlavaBidirForConditionalGeneration:
    """The model without updates, which are added to its weights; a model that has none is returned as it is.

    What is given stays as it is and can go on training. The merged weights are new, in the dtype of the old ones and
    on the CPU, for a GPU that just trained may be full; all the rest is shared.
    """
    if not has_lora(model):
        return model
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    merged = copy.deepcopy(model, shared)
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, LoraLayer):
            merged.set_submodule(name, _merged(layer))
    del merged.model.language_model.peft_config
    return merged


def _merged(layer: LoraLayer) -> nn.Linear:
    base = layer.get_base_layer()
    linear = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    weight = (base.weight + layer.get_delta_weight(NAME)).to("cpu", base.weight.dtype)
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), base.bias
    return linear


def has_lora(model: nn.Module) -> bool:
    return any(isinstance(module, LoraLayer) for module in model.modules())
