"""Options of the commands that read a model or run probes. Nothing here imports torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llava_bidir.common.cli import Seed, positional

from .run_config import DataOptions, ModelOptions, RunConfig


@dataclass(frozen=True, kw_only=True)
class SolveOptions(RunConfig):
    """Options of `probes solve`.

    Args:
        dry_run: Print memory and hours, measured on a few images.
    """

    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(RunConfig):
    """Options of `probes verify-data`: those of a run, whose config can be given as it is; the model is not needed.

    Args:
        workers: Number of processes (default: one per core).
    """

    model: ModelOptions = ModelOptions("")
    workers: Seed | None = None


@dataclass(frozen=True, kw_only=True)
class StudyOptions(RunConfig):
    """Options of `probes study`: those of its probe runs, and its own.

    Args:
        inputs: MODEL ... DATA. Checkpoint directory or hub id, or several as NAME=DIR, each compared with the first;
            then a folder of images and masks (probes/README.md), or the name of a layout (ade20k, with --data.root
            DIR).
        out: Folder of the study.
        ckpt_path: "last" resumes killed runs.
        draws: Draws of random LLMs, and of random adapters; of a bare encoder, of random layers. At most two are also
            permuted.
        arms: Arms to solve: trained, random0, adapter0, permuted0, untrained0, ... (default: trained and all draws).
        fit: Also train probes, as the paper does.
        tasks: Other tasks, each solved on all arms: depth, normals, boundaries.
        add: Further analyses, by the names of their commands, or options of one: knockout.classes=sky,road.
        only: Only these kinds of steps: solve, fit, report, or an analysis.
        dry_run: Print the steps, time, disk and detectable effect.
        overwrite: Replace results that other settings, models or images have made.
    """

    inputs: tuple[str, ...] = positional()
    out: Path = field()  # without the default of a run
    model: ModelOptions = ModelOptions("")
    data: DataOptions = DataOptions("")
    ckpt_path: Literal["last"] | None = "last"
    draws: int = 3
    arms: tuple[str, ...] | None = None
    fit: bool = False
    tasks: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    dry_run: bool = False


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
