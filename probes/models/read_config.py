"""Config of a checkpoint or of a module, and whether its numbers describe a model; no class of a model is imported."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.hf import read_model_config
from llava_bidir.common.images import MAX_GRID_SIDE

from .families.encoders import AnyFamily
from .module_sources import check_names_function, is_source, module_config


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of transformers, before its weights are read.

    Args:
        path: Directory or hub id.
        family: Its family.
        config: Its config; None where files are read that do not depend on it.
        revision: Commit of a hub id, the same for all files.
    """

    path: str
    family: AnyFamily
    config: PreTrainedConfig | None = None
    revision: str | None = None


def read_config(path: str, revision: str | None = None, *, trust: bool = False) -> PreTrainedConfig:
    """Read the config of a checkpoint, or make that of a module (module_sources.py).

    Raises:
        UserError: There is none, transformers does not know its kind, or its mask is in code that is not trusted.
    """
    check_names_function(path)
    if is_source(path):
        return module_config(path)
    return read_model_config("MLLM", path, trust=trust, revision=revision)


def check_numbers(path: str, family: AnyFamily, config: PreTrainedConfig) -> None:
    """Raise a UserError if a config describes no usable grid, encoder or LLM."""
    with error_context(f"config.json of {path}"):
        vision = getattr(config, "vision_config", None)
        if vision is None and "vision_config" in config.sub_configs:
            raise UserError("it has no vision_config: this is a language model without an encoder")
        if config.model_type == "llava" and vision.model_type == "pixtral":
            raise UserError(
                "a llava with a Pixtral encoder has a token after each row of patches; it is not supported"
            )
        # SigLIP has no CLS token, for which the other models of this class drop the first token.
        if vision is not None and vision.model_type.startswith("siglip"):
            if getattr(config, "vision_feature_select_strategy", "full") == "default":
                raise UserError(
                    "vision_feature_select_strategy 'default' drops the first patch, since this encoder has no CLS "
                    "token; expected 'full', because the other patches are no grid"
                )
        side = family.grid(config)[0]
        if not 1 <= side <= MAX_GRID_SIDE:
            raise UserError(f"{side} x {side} image tokens; expected 1 to {MAX_GRID_SIDE} per side")
        tokens = side * family.grid(config)[1]
        if config.model_type == "llava_bidir" and config.image_seq_length != tokens:
            raise UserError(
                f"image_seq_length is {config.image_seq_length}, but the encoder's grid has {tokens} patches"
            )
        for name, size in family.sizes(config).items():
            if size < 1:
                raise UserError(f"{name}: {size}; expected 1 or more")
