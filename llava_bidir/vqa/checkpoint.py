"""What `vqa` records about a checkpoint: its attention mask, its encoder and a fingerprint of its weights."""

from pathlib import Path

from llava_bidir.common.atomic_io import read_json
from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.identity import describe_digest, model_identity

# encoders of Table 1
TABLE_ROWS = {
    "clip_vision_model": "clip",
    "dinov2": "dinov2",
    "siglip_vision_model": "siglip",
}


def resolve_checkpoint(model: str) -> Path:
    """Return the directory of a checkpoint. Hub ids are downloaded or taken from the cache.

    Raises:
        UserError: No such checkpoint exists.
    """
    from huggingface_hub import snapshot_download

    path = Path(model)
    if not path.is_dir():
        try:
            path = Path(
                snapshot_download(
                    model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]
                )
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"{model!r} is neither a checkpoint directory nor a model on the hub or in its cache ({error})"
            ) from error
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} has no config.json; expected a Hugging Face checkpoint such as RUN/hf"
        )
    return path


def read_image_attention(model: str | Path) -> str:
    """Return the attention mask of a checkpoint.

    Raises:
        UserError: The model is not a LLaVA, or a stock `llava` whose config names a mask. Transformers would silently
            ignore that mask.
    """
    config = _read_config(model)
    model_type = config.get("model_type")
    mask = config.get("image_attention", "causal")
    if model_type == "llava" and mask != "causal":
        raise UserError(
            f"{model}: model_type 'llava' with image_attention {mask!r} would silently run causally; export it with "
            "`llava-bidir export` as a llava_bidir"
        )
    if model_type not in ("llava", "llava_bidir"):
        raise UserError(
            f"{model}: model_type {model_type!r} is not supported; expected llava_bidir or llava"
        )
    return mask


def read_encoder_name(model: str | Path) -> str:
    """Return the row of Table 1 for the vision encoder, or the encoder's model type if it has none."""
    with error_context(f"config.json of {model}"):
        vision = _read_config(model).get("vision_config", {})
        model_type = vision.get("model_type", "clip_vision_model")  # the default of LlavaConfig
        return TABLE_ROWS.get(model_type, model_type)


def fingerprint(path: Path) -> str:
    """Return a digest of the config, the processor and all weights. 13 GB take less than a minute, once."""
    return describe_digest(model_identity("model", path)).split()[-1]


def _read_config(model: str | Path) -> dict:
    return read_json(resolve_checkpoint(str(model)) / "config.json")
