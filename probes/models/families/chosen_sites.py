"""The sites of a model, all or those that a user chooses, from its family and config."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from llava_bidir.common.errors import UserError
from probes.models.sites import ALL, ALL_PARTS, is_encoder_layer, part_of, with_parts

from .encoder_layers import encoder_layers
from .encoders import AnyFamily
from .layer_parts import part_sites, parts_text, why_no_part


def chosen_sites(
    family: AnyFamily, config: PreTrainedConfig, sites: str | Sequence[str] | None
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
    main_path = family.sites(config)
    if sites is None:
        return main_path
    if sites in (ALL, [ALL]):
        return [*encoder_sites(family, config), *main_path]
    if sites in (ALL_PARTS, [ALL_PARTS]):
        return all_sites(family, config)
    if isinstance(sites, str):
        raise UserError(f"sites must be a list of names, or 'all', or 'all_parts'; got {sites!r}")
    if any(map(is_encoder_layer, sites)):
        main_path = [*encoder_sites(family, config), *main_path]
    parts = part_sites(family, config)
    if unknown := set(sites) - {*main_path, *parts}:
        site = min(unknown)
        if why := why_no_part(family, config, site):
            raise UserError(why)
        expected = ", ".join(main_path)
        if parts:
            expected += f", and {parts_text({part_of(part) for part in parts})}"
        raise UserError(f"unknown site {site!r}; this model has {expected}")
    return list(sites)


def all_sites(family: AnyFamily, config: PreTrainedConfig) -> list[str]:
    """Return all sites in forward order; without encoder layers and values that cannot be read."""
    try:
        in_encoder = encoder_sites(family, config)
    except UserError:
        in_encoder = []
    return with_parts([*in_encoder, *family.sites(config)], part_sites(family, config))


def encoder_sites(family: AnyFamily, config: PreTrainedConfig) -> list[str]:
    """Return the sites of the encoder's own layers in an MLLM; of a bare encoder, which has none, [].

    Raises:
        UserError: They cannot be read.
    """
    if not family.has_llm:
        return []
    return encoder_layers(family, config).sites
