"""Which weights train: parts of the model, and of its encoder what the adapter reads, or the last blocks of that."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_bidir.common.encoders import encoder_kind, stored_side

from .build import ADAPTER_PREFIX, no_zero3_partitioning
from .lora import UPDATES, has_lora
from .modeling_llava_bidir import LlavaBidirForConditionalGeneration

# Parts that can train, with the name prefixes of their weights
TRAINABLE = {
    "encoder": ("model.vision_tower.",),
    "adapter": (f"model.{ADAPTER_PREFIX}",),
    "llm": ("model.language_model.", "lm_head."),
}


def part_of(name: str) -> str:
    """Return the part of a weight by its name."""
    return next(part for part in TRAINABLE if name.startswith(TRAINABLE[part]))


def set_trainable(
    model: LlavaBidirForConditionalGeneration, parts: list[str], encoder_blocks: int | None = None
) -> None:
    """Freeze all but `parts`; if the LLM has low-rank updates (lora.py), only the updates train.

    Of the encoder train the weights that the adapter's input depends on: neither later blocks nor the final norm, which
    would have no gradient. No graph is recorded below and above what trains.

    Args:
        model: The model.
        parts: Of TRAINABLE.
        encoder_blocks: Number of blocks that train, the last that are read; None: all, with embeddings and positions.
    """
    updates_only = has_lora(model)
    of_encoder = set()
    if "encoder" in parts:
        of_encoder = train_encoder(model, encoder_blocks)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trains = part in parts
        if part == "encoder":
            trains = name in of_encoder
        elif part == "llm" and updates_only:
            trains = trains and UPDATES in name
        parameter.requires_grad_(trains)


def train_encoder(model: LlavaBidirForConditionalGeneration, blocks: int | None) -> set[str]:
    """Return the names of the encoder's weights that train, and end its graph where nothing reads on."""
    tower = model.model.vision_tower
    layer = model.config.vision_feature_layer
    layers = encoder_layers(tower)
    read = count_read(layer, len(layers))
    for unread in layers[read : read + 1]:
        unread.register_forward_pre_hook(_detach)
    (prefix,) = TRAINABLE["encoder"]
    if blocks in (None, read):
        return {prefix + name for name in weights_read(tower, layer, model.config.encoder_norm)}
    trained = {p for block in layers[read - blocks : read] for p in block.parameters()}
    if model.config.encoder_norm:
        trained.update(tower.get_submodule(model.config.encoder_norm).parameters())
    return {prefix + name for name, parameter in tower.named_parameters() if parameter in trained}


def encoder_layers(tower: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of a vision tower."""
    return tower.get_submodule(encoder_kind(tower.config.model_type).layers)


def count_read(layer: int, layers: int) -> int:
    """Return how many of an encoder's blocks the hidden states of a layer pass."""
    return layer % (layers + 1)


def weights_read(tower: PreTrainedModel, layer: int, norm: str) -> set[str]:
    """Return the names of the weights that the adapter's input depends on, by a pass without values.

    Args:
        tower: The encoder.
        layer: Index of the hidden states that are read.
        norm: Path of the norm that is applied to them; "" for none.
    """
    with no_zero3_partitioning(), torch.device("meta"), torch.enable_grad():
        copy = type(tower)._from_config(tower.config, dtype=torch.float32)
        side = stored_side(tower.config)
        pixels = torch.empty(1, 3, side, side)
        states = copy(pixels, output_hidden_states=True).hidden_states[layer]
        if norm:
            states = copy.get_submodule(norm)(states)
        states.sum().backward()
    return {name for name, parameter in copy.named_parameters() if parameter.grad is not None}


def _detach(block: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (states[0].detach(), *states[1:])


def set_train_mode(model: LlavaBidirForConditionalGeneration) -> None:
    """Set train mode, and eval mode where the encoder does not train."""
    model.train()
    tower = model.model.vision_tower
    layers = encoder_layers(tower)
    tower.train(trains(layers[0]))  # with the embeddings
    for layer in layers:
        layer.train(trains(layer))


def trains(module: nn.Module) -> bool:
    """Return whether a weight of a module trains."""
    return any(parameter.requires_grad for parameter in module.parameters())
