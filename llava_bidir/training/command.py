"""`llava-bidir fit | validate | test`: the mask's name is checked before Lightning is imported, which takes seconds."""

from pkgutil import resolve_name

from llava_bidir.common.configs import merge_configs, take_configs
from llava_bidir.common.errors import error_context
from llava_bidir.common.imports import take_option
from llava_bidir.model.attention import block_ids_of

OPTIONS = [
    f"--{part}{name}" for part in ("model.", "") for name in ("image_attention", "image-attention")
]


def main(argv: list[str]) -> None:
    """Run a command of LightningCLI.

    Raises:
        UserError: There is no such mask.
    """
    given, _ = take_option(argv, *OPTIONS)
    with error_context("model.image_attention"):
        if not given:
            configs, _ = take_configs(argv)
            model = merge_configs(configs, {}).get("model", {})
            given = [model.get("image_attention", "causal")]
        block_ids_of(given[-1])
    resolve_name("llava_bidir.training.cli:main")(argv)
