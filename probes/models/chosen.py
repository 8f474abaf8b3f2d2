"""What a model's config says of a run, before data and weights are read: mask, sites, and whether it can be so."""

from typing import NamedTuple

from transformers import PreTrainedConfig

from probes.config import ModelOptions

from .attention_masks import check_masks, mask_backend
from .encoder_cut import check_cut
from .families import family_of, own_image_attention, sized_family
from .families.chosen_sites import chosen_sites
from .families.encoders import AnyFamily
from .read_config import read_config


class ChosenModel(NamedTuple):
    """A model as its options choose it.

    Args:
        config: Its config.
        family: Its family.
        mask: Attention mask among image tokens.
        sites: Sites that are probed, in the order of the choice.
    """

    config: PreTrainedConfig
    family: AnyFamily
    mask: str
    sites: list[str]


def choose_model(options: ModelOptions) -> ChosenModel:
    """Return a model as its options choose it; its config alone is read.

    Raises:
        UserError: There is no such model, mask or site, or the model takes no such images or cut.
    """
    config = read_config(options.mllm, trust=options.trust)
    family = family_of(config)
    if options.image_px is not None:
        sized_family(family, config, options.image_px, options.image_resize)
    sites = chosen_sites(family, config, options.sites or None)
    check_cut(options.cut, family, config)
    mask = options.image_attention or own_image_attention(config)
    if family.has_llm:
        llm = config.get_text_config()
        check_masks(mask, llm, mask_backend(llm))
    return ChosenModel(config=config, family=family, mask=mask, sites=sites)
