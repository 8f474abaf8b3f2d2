"""Options of the commands that read a model: sites, mask, states, segment and lab. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path

from llava_bidir.common.options import positional


@dataclass(frozen=True, kw_only=True)
class SitesOptions:
    """Options of `probes sites`.

    Args:
        mllm: Checkpoint directory or hub id, whose weights are not loaded; or timm:NAME or FILE.py:FUNCTION, which is
            built.
        image_px: Side of the square input of a bare encoder, a multiple of its patch (default: as published).
    """

    mllm: str = positional()
    image_px: int | None = None


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """Options of `probes mask`.

    Args:
        mllm: Checkpoint directory or hub id; loaded in float32.
        image_attention: Image attention that `probes` applies, instead of the model's own forward.
    """

    mllm: str = positional()
    image_attention: str | None = None


@dataclass(frozen=True, kw_only=True)
class StatesOptions:
    """Options of `probes states`.

    Args:
        mllm: Checkpoint directory or hub id, timm:NAME or FILE.py:FUNCTION.
        image: Image files.
        out: A .safetensors file with "SITE" f[images, T, d].
        sites: Sites to write; `all` with the encoder's own layers in an MLLM, `all_parts` also with what is inside the
            layers; A+B for two side by side (default: encoder, adapter and outputs of layers).
        image_attention: Image attention (default: the checkpoint's own).
        prefix: Text before the image (default: from the chat template).
        image_px: Side of the square input of a bare encoder, a multiple of its patch (default: as published).
        overwrite: Replace the file if there is one.
    """

    mllm: str = positional()
    image: tuple[Path, ...] = positional()
    out: Path
    sites: tuple[str, ...] | None = None
    image_attention: str | None = None
    prefix: str | None = None
    image_px: int | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """Options of `probes segment`.

    Args:
        probes: Folder of a finished probe run, unless it stands before the photos: probes segment RUN PHOTO ...
        photos: Image files with distinct names.
        site: Site of the probe (default: the run's best decoder layer).
        out: Folder for NAME.png (class indices), NAME_overlay.png, legend.png and legend.json; only files that this
            command has written are replaced.
        trust: Run the file of a run whose model is FILE.py:FUNCTION; read it first.
    """

    probes: str | None = None
    photos: tuple[str, ...] = positional()
    site: str | None = None
    out: Path
    trust: bool = False


@dataclass(frozen=True, kw_only=True)
class LabOptions:
    """Options of `probes lab`.

    Args:
        runs: Finished probe runs on the same images, one per mask or model, side by side.
        mllm: Checkpoint directory or hub id, timm:NAME or FILE.py:FUNCTION, without probes: words and attention.
        port: Port of the page; 0 for any free one.
        host: Address to listen at, for other machines (default: 127.0.0.1).
        trust: Run the files of runs whose models are FILE.py:FUNCTION; read them first.
    """

    runs: tuple[str, ...] = positional(default=())
    mllm: str | None = None
    port: int = 8899
    host: str | None = None
    trust: bool = False
