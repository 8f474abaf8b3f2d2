"""What must be known of a checkpoint before it is evaluated: its mask, its encoder, and which weights it holds."""

import hashlib
from pathlib import Path

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import error_context, read_json

TABLE_ROWS = {"clip_vision_model": "clip", "dinov2": "dinov2", "siglip_vision_model": "siglip"}  # as in Table 1


def local(model: str) -> Path:
    """The directory of a checkpoint; one of the hub is brought here, or found in the cache.

    Raises:
        UserError: There is none.
    """
    from huggingface_hub import snapshot_download

    path = Path(model)
    if not path.is_dir():
        try:
            path = Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{model!r} is neither a checkpoint directory nor a model that the hub or its cache has ({error})"
            ) from error
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no config.json; expected a Hugging Face checkpoint, RUN/hf for one")
    return path


def image_attention(model: str | Path) -> str:
    """The mask a checkpoint runs under.

    Raises:
        UserError: It is no LLaVA, or a stock `llava` whose config names a mask: transformers would load it without a
            word and run it causally.
    """
    config = _config(model)
    kind, mask = config.get("model_type"), config.get("image_attention", "causal")
    if kind == "llava" and mask != "causal":
        raise UserError(
            f"{model}: model_type 'llava' with image_attention {mask!r} would silently run causally; export it with "
            "`llava-bidir export`, which makes it a llava_bidir"
        )
    if kind not in ("llava", "llava_bidir"):
        raise UserError(f"{model}: model_type {kind!r}; there is llava_bidir and llava")
    return mask


def encoder(model: str | Path) -> str:
    """Name of the vision encoder: a row of Table 1 where it is one of the paper's."""
    with error_context(f"config.json of {model}"):
        kind = _config(model).get("vision_config", {}).get("model_type", "clip_vision_model")  # LlavaConfig's default
        return TABLE_ROWS.get(kind, kind)


def fingerprint(path: Path) -> str:
    """Digest of the config and of every weight; 13 GB take less than a minute."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no *.safetensors; export the checkpoint with `llava-bidir export`")
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _config(model: str | Path) -> dict:
    return read_json(local(str(model)) / "config.json")
