"""Options of probe runs, as values: what `probes fit` and `probes solve` make from, and what a study passes on to them.

An option is a field here, with its type, default and description; the parsers of the commands are made of them. The
model's and the data's are also the arguments of `ProbeModule` and `ProbeDataModule`, which LightningCLI parses for
`fit`.
Nothing here imports torch or Lightning.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from llava_bidir.common.cli import Values
from llava_bidir.common.errors import UserError


@dataclass(frozen=True)
class ModelOptions:
    """Options of the frozen model and of its probes.

    Args:
        mllm: Checkpoint directory or hub id, of an MLLM or of a bare vision encoder; or timm:NAME; or FILE.py:FUNCTION,
            whose code is run, see probes/models/encoders.md.
        image_attention: Mask among image tokens; None for the one that the model was trained with.
        untrained: Parts that get random weights, as a control: adapter, llm; of a bare vision encoder: encoder.
        match: How a random LLM or encoder resembles the trained one: none; update, whose layers change the states as
            much as the trained ones; or permuted, the trained weights in random order. See
            probes/models/random_init.py.
        draw: Number of the draw of random weights; several draws show what differs between them.
        image_px: Side of the square input of a bare vision encoder, a multiple of its patch; None for the one that it
            is published with. An MLLM has that of its checkpoint.
        image_resize: How images become squares: squash, pad (LLaVA's stage 2), center_crop (its stage 1) or letterbox
            (DeepSeek-VL). It replaces the checkpoint's way, with its crop, but not its filter.
            Deviates: LLaVA trains and evaluates with padding. The paper does not say; squash uses all patches.
        dtype: Dtype of the model, auto as stored in the checkpoint. A CPU that multiplies in bfloat16 takes 0.6 of the
            time in it, and mIoU can move by 0.1 points (probes/models/encoders.md). Probes are always float32.
        prefix: Text before the image; None for the checkpoint's chat template up to the image.
        sites: Sites to probe; None for all outputs of layers but those of the encoder's own layers in an MLLM
            (encoder_00 ...), which are probed by name, or by all. Values, attention and MLP inside the layers
            (value_01, attn_01, mlp_01 ...) are probed by name, or with the others by all_parts.
        head: Kind of probe: linear (the paper), or another, see probes/heads.py; only linear ones are solved.
        feature_norm: Normalisation before the head: none (the paper), batchnorm or layernorm. Solved probes have
            batchnorm, and neither this nor the options of AdamW below.
        learning_rate: Initial learning rate of AdamW, with polynomial decay (power 0.9) to zero.
        betas: Betas of AdamW.
        weight_decay: Weight decay of AdamW.
    """

    mllm: str
    image_attention: str | None = None
    untrained: list[str] | None = None
    match: Literal["none", "update", "permuted"] = "none"
    draw: int = 0
    image_px: int | None = None
    image_resize: str = "squash"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    prefix: str | None = None
    sites: list[str] | Literal["all", "all_parts"] | None = None
    head: str = "linear"
    feature_norm: Literal["none", "batchnorm", "layernorm"] = "none"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0


@dataclass(frozen=True)
class DataOptions:
    """Options of images and targets.

    Args:
        root: Folder of images and masks (probes/README.md), or of the layout below.
        dataset: Layout: folder (images, PNG masks, classes.json), ade20k, voc2012, cityscapes, nyuv2, or a registered
            one.
        task: Kind of targets, see probes/README.md: segmentation, depth, normals, boundaries, or a registered one.
        options: Options of the layout, see its class, e.g. {"background": "class"} for voc2012.
        name: Name of the dataset in reports; None for the name of the folder.
        batch_size: Images per batch over all devices; 64 in the paper.
        cache_features: Keep all states in memory, so that the frozen forward runs once instead of once per epoch.
        num_workers: Processes per device that open images, at most one per core.
    """

    root: str
    dataset: str = "folder"
    task: str = "segmentation"
    options: Values | None = None
    name: str | None = None
    batch_size: int = 64
    cache_features: bool = False
    num_workers: int = 4


@dataclass(frozen=True)
class SolverOptions:
    """Options of the solver.

    Args:
        folds: Folds of training images that choose the strength.
        strengths: Strengths of regularisation to solve and score; by default the best one, searched in half decades,
            and its neighbours; for depth and normals 25 from 1e-6 to 1.
        memory_gb: GB of states that are kept at a time; by default most of the free memory. Sites go through in groups
            that fit. A site that takes more is in a file of --out until it is solved; the result is the same.
    """

    folds: int = 4
    strengths: tuple[float, ...] | None = None
    memory_gb: float | None = None

    def __post_init__(self):
        """Raise a UserError if an option is out of range."""
        if self.folds < 2:
            raise UserError(f"--folds must be at least 2, got {self.folds}")
        if self.memory_gb is not None and not self.memory_gb >= 0:
            raise UserError(f"--memory-gb must be at least 0, got {self.memory_gb:g}")
        if invalid := [x for x in self.strengths or () if not 0 < x < float("inf")]:
            raise UserError(f"--strengths must be above 0, got {invalid[0]:g}")


@dataclass(frozen=True)
class RunConfig:
    """All that `probes fit` or `probes solve` is told.

    Args:
        model: The frozen model.
        data: Images and targets.
        solver: Of `probes solve`.
        trainer: Arguments of Lightning's Trainer by name, as YAML has them.
        seed_everything: Seed of probes, re-initialised parts, and samples.
        out: Folder of the run.
        save_predictions: Also write the predictions of every image to OUT/predictions/SITE/NAME.png.
        overwrite: Replace the run that OUT holds.
        ckpt_path: "last" resumes a killed run and leaves a finished one alone.
    """

    model: ModelOptions
    data: DataOptions
    solver: SolverOptions = field(default_factory=SolverOptions)
    trainer: Values = field(default_factory=dict)
    seed_everything: int = 0
    out: str = "runs/probes"
    save_predictions: bool = False
    overwrite: bool = False
    ckpt_path: Literal["last"] | None = None

    @classmethod
    def of(cls, options: "RunConfig", **own: Any) -> Self:
        """Return the options of a run among those of a command, with some of its own."""
        return cls(**{entry.name: getattr(options, entry.name) for entry in fields(cls)} | own)
