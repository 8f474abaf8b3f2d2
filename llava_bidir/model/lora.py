"""LoRA updates of the LLM by peft, and their merging into the weights."""

import copy
import logging
import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from llava_bidir.common.errors import UserError

from .modeling_llava_bidir import LlavaBidirForConditionalGeneration

log = logging.getLogger(__name__)

NAME = "default"  # the name peft gives to a single set of updates
UPDATES = ".lora_"  # substring of the parameter names of updates
LOST = (
    1e-3  # share of the updates that an export may lose without advice; float32 loses 1e-7 to 1e-5
)


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of every linear layer of the LLM except its head.

    Source: LLaVA scripts/v1_5/finetune_lora.sh and train.py:108, find_all_linear_names.

    Args:
        r: Rank.
        alpha: Updates are scaled by alpha / r.
        dropout: Dropout probability of the input of the updates.
    """

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05

    def __post_init__(self):
        if self.r is None or self.r < 1:
            raise UserError(f"model.lora.r must be at least 1, got {self.r}")
        if self.dropout is None or not 0 <= self.dropout < 1:
            raise UserError(f"model.lora.dropout must be from 0 to less than 1, got {self.dropout}")


def add_lora(model: LlavaBidirForConditionalGeneration, lora: Lora) -> None:
    """Add updates to the linear layers of the LLM, in torch's default dtype; they are zero at first."""
    from peft import LoraConfig, inject_adapter_in_model  # the environment of lmms-eval has none

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
    )
    llm = model.model.language_model  # does not include the head
    # peft converts updates to the dtype of their weights, so weights in another dtype are absent meanwhile
    dtype = torch.get_default_dtype()
    weights = {p: p.data for p in llm.parameters() if p.dtype != dtype}
    for parameter, data in weights.items():
        parameter.data = torch.empty((), dtype=dtype, device=data.device).expand(data.shape)
    inject_adapter_in_model(config, llm, NAME)
    for parameter, data in weights.items():
        parameter.data = data


@torch.no_grad()
def merge_lora(
    model: LlavaBidirForConditionalGeneration, folder: Path
) -> LlavaBidirForConditionalGeneration:
    """Return a copy of the model with the updates added to its weights, or the model itself if it has none.

    The given model is unchanged and can continue training. Merged weights keep their dtype: sums of float32 are rounded
    once, and the share of the updates that is lost is logged. They are computed on the CPU, because a GPU may be full
    after training and would round differently. All other tensors are shared.

    Args:
        model: The model.
        folder: Folder for the merged weights, in files that are mapped: a 7B model and its copy need not fit into
            memory together. Keep it as long as the copy.
    """
    if not has_lora(model):
        return model
    from peft.tuners.lora import LoraLayer

    shared = {
        id(tensor): nn.Parameter(tensor.cpu()) if UPDATES in name else tensor
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    }
    merged = copy.deepcopy(model, shared)
    lost = total = 0.0
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, LoraLayer):
            update = _update(layer)
            linear = _merge_layer(layer, update, folder / name)
            added = linear.weight.float() - layer.get_base_layer().weight.cpu().float()
            lost += float((added - update).square().sum())
            total += float(update.square().sum())
            merged.set_submodule(name, linear)
    share = math.sqrt(lost / total) if total else 0.0
    log.info(
        "merged the updates of LoRA into %s weights; rounding took %.2g of their norm%s",
        str(linear.weight.dtype).removeprefix("torch."),
        share,
        "" if share < LOST else ": `llava-bidir export --dtype float32` keeps them",
    )
    del merged.model.language_model.peft_config
    return merged


def _update(layer: nn.Module) -> torch.Tensor:
    """Return the update of a layer's weight in float32; peft rounds that of 16 bits before it is added."""
    a = layer.lora_A[NAME].weight.cpu().float()
    b = layer.lora_B[NAME].weight.cpu().float()
    return layer.scaling[NAME] * (b @ a)


def _merge_layer(layer: nn.Module, update: torch.Tensor, file: Path) -> nn.Linear:
    base = layer.get_base_layer()
    linear = nn.Linear(
        base.in_features, base.out_features, bias=base.bias is not None, device="meta"
    )
    weight = (base.weight.cpu().float() + update).to(base.weight.dtype)
    mapped = torch.from_file(
        str(file),
        shared=True,
        size=weight.numel(),
        dtype=weight.dtype,
    ).view_as(weight)
    linear.weight = nn.Parameter(mapped.copy_(weight), requires_grad=False)
    linear.bias = base.bias
    return linear


def has_lora(model: nn.Module) -> bool:
    """Return True if a layer of the model has low-rank updates."""
    return any(UPDATES in name for name, _ in model.named_parameters())
