"""Which sites a choice of names stands for, from the family and the config of a model, without its weights."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedConfig

from llava_bidir.common.errors import UserError
from probes.models.sites import (
    PARTS,
    is_encoder_layer,
    part_of,
    wants_all,
    wants_all_parts,
    with_parts,
)

from .base import Family
from .encoder_layers import encoder_layers
from .encoders import EncoderFamily
from .layer_parts import part_sites, why_no_part


def parts_text(kinds: Collection[str]) -> str:
    """Return the names of the sites inside layers, of some kinds of parts: "attn_NN and mlp_NN inside layer_NN"."""
    *others, last = [f"{part}_NN" for part in PARTS if part in kinds]
    return f"{', '.join(others)}{' and ' if others else ''}{last} inside layer_NN"


def encoder_sites(family: Family | EncoderFamily, config: PreTrainedConfig) -> list[str]:
    """Return the sites of the encoder's own layers in an MLLM; of a bare encoder, which has none, [].

    Raises:
        UserError: They cannot be read.
    """
    return encoder_layers(family, config).sites if family.has_llm else []


def all_sites(family: Family | EncoderFamily, config: PreTrainedConfig) -> list[str]:
    """Return all sites in forward order; without encoder layers and values that cannot be read."""
    try:
        in_encoder = encoder_sites(family, config)
    except UserError:
        in_encoder = []
    return with_parts([*in_encoder, *family.sites(config)], part_sites(family, config))


def chosen_sites(
    family: Family | EncoderFamily,
    config: PreTrainedConfig,
    sites: str | Sequence[str] | None,
) -> list[str]:
    """Return the names of the chosen sites, in the order of the choice.

    Args:
        family: The model's family.
        config: Its config.
        sites: Names; None for the main path without the encoder's own layers in an MLLM, "all" with these, "all_parts"
            for :func:`all_sites`.

    Raises:
        UserError: A site is unknown, is a layer of an encoder whose layers cannot be read, or is a part that its
            layer does not have.
    """
    own = family.sites(config)
    if sites is None:
        return own
    if wants_all(sites):
        return [*encoder_sites(family, config), *own]
    if wants_all_parts(sites):
        return all_sites(family, config)
    if isinstance(sites, str):
        raise UserError(f"sites must be a list of names, or 'all', or 'all_parts'; got {sites!r}")
    if any(map(is_encoder_layer, sites)):
        own = [*encoder_sites(family, config), *own]
    parts = part_sites(family, config) if any(map(part_of, sites)) else []
    if unknown := set(sites) - {*own, *parts}:
        site = min(unknown)
        why = why_no_part(family, config, site)
        known = {part_of(part) for part in parts or part_sites(family, config)}
        inside = f", and {parts_text(known)}" if known else ""
        raise UserError(why or f"unknown site {site!r}; this model has {', '.join(own)}{inside}")
    return list(sites)
