"""The options of all commands but analyses, as frozen dataclasses; nothing here imports torch.

An option is a field, with its type, default and description; the parsers of the commands are made of them.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from llava_bidir.common.cli import (
    Count,
    Index,
    NonNegative,
    Positive,
    Seed,
    Share,
    ShareBelow1,
    Values,
    derived,
    number,
    positional,
)

# Where attention is cut in all forwards of a model (probes/models/encoder_cut.py); "alone": from CLS and registers, too
Cut = Literal["encoder", "encoder_alone", "llm", "both", "both_alone"]
Folds = number("Folds", int, ">= 2 < 2147483648")
Port = number("Port", int, ">= 0 < 65536")
Scale = number("Scale", float, ">= 0.01 <= 1000")

POINTS = 1.0  # of a class score that count as nothing, unless a study says otherwise

# Options of `probes fit` that its configs have, without a meaning for solved probes
OF_FIT = (
    "model.feature_norm",
    "model.dropout",
    "model.init_std",
    "model.schedule",
    "model.warmup_steps",
    "model.loss_average",
    "model.exact_loss",
    "model.flip",
    "model.learning_rate",
    "model.betas",
    "model.weight_decay",
    "data.cache_features",
    "data.random_scale",
    "data.max_class_share",
    "data.flip_probability",
    "data.photometric_hue",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.val_check_interval",
    "trainer.check_val_every_n_epoch",
    "trainer.log_every_n_steps",
)


def split_label(text: str) -> tuple[str, str]:
    """Return label and path of LABEL=PATH; the label is "" of a path alone, which can have a "=" in it, too."""
    label, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return "", text
    return label, path


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
            probes/models/random_weights.py.
        draw: Number of the draw of random weights; several draws show what differs between them.
        image_px: Side of the square input of a bare vision encoder, a multiple of its patch; None for the one that it
            is published with. An MLLM has that of its checkpoint.
        image_resize: How images become squares: squash, pad (LLaVA's stage 2), center_crop (its stage 1) or letterbox
            (DeepSeek-VL). It replaces the checkpoint's way, with its crop, but not its filter. Or slide: the shorter
            side is resized to image_px, bilinearly, and logits are averaged over windows of this side, of which a photo
            has several.
            Deviates: LLaVA trains and evaluates with padding. The paper does not say; squash uses all patches.
        stride_px: From one window of slide to the next; None for two thirds of the side.
        dtype: Dtype of the model, auto as stored in the checkpoint. A CPU that multiplies in bfloat16 takes 0.6 of the
            time in it, and mIoU can move by 0.1 points (probes/models/encoders.md). Probes are always float32.
        prefix: Text before the image; None for the checkpoint's chat template up to the image.
        trust: Run the code of a mask of the checkpoint's own, its attention.py; read it first.
        cut: Let patches see only themselves: in the encoder (with CLS and registers; encoder_alone: without), in the
            llm, whose image tokens then see only themselves and the text before the image, or in both.
        sites: Sites to probe; None for all outputs of layers but those of the encoder's own layers in an MLLM
            (encoder_00 ...), which are probed by name, or by all. Values, attention and MLP inside the layers
            (value_01, attn_01, mlp_01 ...) are probed by name, or with the others by all_parts.
        head: Kind of probe: linear (the paper), or another, see probes/heads.py; only linear ones are solved. A study
            with --fit trains it beside linear ones. Or the file of a published head, which `fit` scores as it is
            (probes/fit/README.md).
        feature_norm: Normalisation before the head: none (the paper), batchnorm, batchnorm_affine, whose scale and
            shift are trained, or layernorm. Solved probes have batchnorm, and neither this nor the options below.
        dropout: Probability that a channel of an image is 0 in training, before the normalisation.
        init_std: Standard deviation of the weights of a new head, whose biases are 0; None for torch's own.
        learning_rate: Highest learning rate of AdamW.
        betas: Betas of AdamW.
        weight_decay: Weight decay of AdamW.
        schedule: Decay of the learning rate to zero: linear or cosine, see probes/fit/schedule.py; None for a
            polynomial of power 0.9.
        warmup_steps: Steps in which it rises first.
        loss_average: What the loss is the mean over: all_pixels, with those that are ignored, whose loss is 0; None for
            labelled pixels.
        flip: Average the outputs of probes with those of the mirrored image wherever images are predicted.
        exact_loss: The loss is that of all pixels, not of a few points in each patch (probes/ops/README.md).
    """

    mllm: str
    image_attention: str | None = None
    untrained: list[str] | None = None
    match: Literal["none", "update", "permuted"] = "none"
    draw: Index = 0
    image_px: Count | None = None
    image_resize: str = "squash"
    stride_px: Count | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    prefix: str | None = None
    trust: bool = False
    cut: Cut | None = None
    sites: list[str] | Literal["all", "all_parts"] | None = None
    head: str = "linear"
    feature_norm: Literal["none", "batchnorm", "batchnorm_affine", "layernorm"] = "none"
    dropout: ShareBelow1 | None = None
    init_std: Positive | None = None
    learning_rate: NonNegative = 1e-3
    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    schedule: Literal["linear", "cosine"] | None = None
    warmup_steps: Count | None = None
    loss_average: Literal["all_pixels"] | None = None
    exact_loss: bool | None = None
    flip: bool = False


@dataclass(frozen=True)
class DataOptions:
    """Options of images and targets.

    Args:
        root: Folder of images and masks (probes/README.md), or of the layout below.
        dataset: Layout: folder (images, PNG masks, classes.json), ade20k, voc2012, cityscapes, nyuv2, or a registered
            one.
        task: Kind of targets, see probes/README.md: segmentation, depth, normals or boundaries.
        options: Options of the layout, see its class, e.g. {"background": "class"} for voc2012.
        name: Name of the dataset in reports; None for the name of the folder.
        blank: Read a blank picture of each photo's size and mean colour in its place.
        validation: Share of the photos that are validation, of a folder without splits (NAME.jpg beside NAME.png, or
            images/ and masks/); drawn by the seed, and nothing is moved.
        groups: Regular expression: photos in whose names it finds the same text stay in one split, e.g. '^.*_' for
            frames CLIP_0001.
        batch_size: Images per batch over all devices; 64 in the paper.
        random_scale: Train on random crops: the shorter side of a photo is resized to image_px times a number from this
            range, and a square of image_px is cut out; what it lacks is ignored. None for photos as they are validated.
        max_class_share: A crop is drawn again, up to ten times, if a class has this share of its labelled pixels.
        flip_probability: Of a crop, to be mirrored.
        photometric_hue: Brightness, contrast, saturation and hue of a crop change at random, the hue by up to this
            share of the circle.
        cache_features: Keep all states in memory, so that the frozen forward runs once instead of once per epoch.
        num_workers: Processes per device that open images, at most one per core.
    """

    root: str
    dataset: str = "folder"
    task: str = "segmentation"
    options: Values | None = None
    name: str | None = None
    blank: bool | None = None
    validation: ShareBelow1 | None = None
    groups: str | None = None
    batch_size: Count = 64
    random_scale: tuple[Positive, Positive] | None = None
    max_class_share: Positive | None = None
    flip_probability: Share | None = None
    photometric_hue: Share | None = None
    cache_features: bool = False
    num_workers: Index = 4


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

    folds: Folds = 4
    strengths: tuple[Positive, ...] | None = None
    memory_gb: NonNegative | None = None


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
    seed_everything: Seed = 0
    out: str = "runs/probes"
    save_predictions: bool = False
    overwrite: bool = False
    ckpt_path: Literal["last"] | None = None

    @classmethod
    def of(cls, options: "RunConfig", **changes: Any) -> Self:
        """Return the options of a run among those of a command, with changes."""
        values = {option.name: getattr(options, option.name) for option in fields(cls)}
        return cls(**values | changes)


@dataclass(frozen=True, kw_only=True)
class SolveOptions(RunConfig):
    """Options of `probes solve`.

    Args:
        dry_run: Print memory and hours, measured on a few images.
    """

    dry_run: bool = False
    first_words = ("model.mllm", "data.root")
    in_configs_only = OF_FIT


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(RunConfig):
    """Options of `probes verify-data`: those of a run, whose config can be given as it is; the model is not needed.

    Args:
        workers: Number of processes (default: one per core).
        preview: PNG file for a sheet of eight photos with their masks over them; an existing one is replaced.
    """

    model: ModelOptions = ModelOptions("")
    workers: Index | None = None
    preview: Path | None = None
    first_words = ("data.root",)


@dataclass(frozen=True, kw_only=True)
class MasksOptions:
    """Options of `probes masks`.

    Args:
        sources: What has the annotations: a file or folder (probes/masks/README.md), or the hub id of a data set; or
            training=A validation=B.
        out: Folder of images, annotations and classes.json that is written, with preview.png.
        format: coco, panoptic, labelme, yolo, colour, ade20k or datasets (default: told from the content).
        images: Folder of the photos, where they are not beside the annotations.
        unlabelled: What pixels are that no annotation has: ignore, or the name of a class.
        overlap: Whose pixels are those of two objects: of the smaller one, the later one, or ignore.
        crowd: What regions of iscrowd are: ignore, or class, that of their category.
        classes: Classes to keep: NAME, or NEW=NAME, of which several merge; the pixels of others are unlabelled. Or a
            JSON file of names by id, for a data set.
        image_column: Column of the photos in a data set.
        mask_column: Column of the masks.
        validation: Share of the photos that are validation, where the source has no splits.
        groups: Regular expression; photos in whose names it finds the same text stay in one split.
        seed: Of the split.
    """

    sources: tuple[str, ...] = positional()
    out: Path
    format: str | None = None
    images: Path | None = None
    unlabelled: str | None = None
    overlap: Literal["smaller", "later", "ignore"] = "smaller"
    crowd: Literal["ignore", "class"] = "ignore"
    classes: tuple[str, ...] = ()
    image_column: str = "image"
    mask_column: str = "mask"
    validation: ShareBelow1 | None = None
    groups: str | None = None
    seed: Seed = 0


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
        training_images: Also solve the trained model's probes on subsets of the training photos: numbers, of which each
            has three draws, and all.
        control_sites: Probe random and permuted models at their first site, every Nth layer and the last one; what is
            judged beyond random is then of these layers of the trained model, too.
        cuts: Also cut attention in the encoder, in the llm, or in both, with probes and controls under each cut: does
            the LLM recover what the encoder's context had told?
        fit: Also train probes, as the paper does.
        blank: Also solve probes of the trained model on blank pictures.
        tasks: Other tasks, each solved on all arms: depth, normals, boundaries.
        margin: Points of a class score that count as nothing, chosen before any result.
        add: Further analyses, by the names of their commands, or options of one: knockout.classes=sky,road.
        only: Only these kinds of steps: solve, fit, report, or an analysis.
        dry_run: Print the steps, time, disk and detectable effect.
        overwrite: Replace results that other settings, models or images have made.
        models: Checkpoint directory or hub id by label, in order; one model has the label "".
    """

    inputs: tuple[str, ...] = positional(least=2)
    out: Path = field()  # without the default of a run
    model: ModelOptions = ModelOptions("")
    data: DataOptions = DataOptions("")
    ckpt_path: Literal["last"] | None = "last"
    draws: Index = 3
    arms: tuple[str, ...] = ()
    training_images: tuple[str, ...] = ()
    control_sites: Count = 1
    cuts: tuple[Literal["encoder", "llm", "both"], ...] = ()
    fit: bool = False
    blank: bool = False
    tasks: tuple[str, ...] = ()
    margin: Positive = POINTS
    add: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    dry_run: bool = False
    models: dict[str, str] = derived(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the models, () if one has none."""
        return tuple(filter(None, self.models))


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `probes report`.

    Args:
        studies: Folders of studies; NAME=STUDY names the model. Of several models on the same photos, each is compared
            with the first.
        out: Folder for index.html, results.json, *.csv, *.pdf and *.png.
        labels: Labels of a study's models, in the order in which they are compared (default: those that the study was
            given).
        table1: Files table1.json of `llava-bidir vqa` or `vqa-table`; summary.md and summary.tex then have these
            benchmarks of the models, too.
        margin: Points of a class score that count as nothing (default: those that the studies were given).
    """

    studies: tuple[str, ...] = positional()
    out: Path
    labels: tuple[str, ...] = ()
    table1: tuple[Path, ...] = ()
    margin: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class SitesOptions:
    """Options of `probes sites`.

    Args:
        mllm: Checkpoint directory or hub id, whose weights are not loaded; or timm:NAME or FILE.py:FUNCTION, which is
            built.
        image_px: Side of the square input of a bare encoder, a multiple of its patch (default: as published).
        trust: Run the code of a mask of the checkpoint's own, its attention.py; read it first.
    """

    mllm: str = positional()
    image_px: Count | None = None
    trust: bool = False


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """Options of `probes mask`.

    Args:
        mllm: Checkpoint directory or hub id; loaded in float32. Of an image of more than 256 tokens, 256 are measured.
        image_attention: Image attention that `probes` applies, instead of the model's own forward.
        png: A .png file for a picture of the measured mask.
        overwrite: Replace the file if there is one.
        trust: Run the code of a mask of the checkpoint's own, its attention.py; read it first.
    """

    mllm: str = positional()
    image_attention: str | None = None
    png: Path | None = None
    overwrite: bool = False
    trust: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Options of `probes attention`.

    Args:
        mllm: Checkpoint directory or hub id.
        photo: Image file.
        out: A .png file.
        patch: Row and column of the patch that attends, from 0 (default: in the middle).
        image_attention: Image attention (default: the checkpoint's own).
        image_px: Side of the square input of a bare encoder, a multiple of its patch (default: as published).
        overwrite: Replace the file if there is one.
        trust: Run the code of a mask of the checkpoint's own, its attention.py; read it first.
    """

    mllm: str = positional()
    photo: Path = positional()
    out: Path
    patch: tuple[Index, Index] | None = None
    image_attention: str | None = None
    image_px: Count | None = None
    overwrite: bool = False
    trust: bool = False


@dataclass(frozen=True, kw_only=True)
class StatesOptions:
    """Options of `probes states`.

    Args:
        mllm: Checkpoint directory or hub id, timm:NAME or FILE.py:FUNCTION.
        image: Image files.
        out: A .safetensors file with "SITE" f[images, T, d].
        sites: Sites to write; `all` with the encoder's own layers in an MLLM, `all_parts` also with what is inside the
            layers (default: encoder, adapter and outputs of layers).
        image_attention: Image attention (default: the checkpoint's own).
        prefix: Text before the image (default: from the chat template).
        image_px: Side of the square input of a bare encoder, a multiple of its patch (default: as published).
        overwrite: Replace the file if there is one.
        trust: Run the code of a mask of the checkpoint's own, its attention.py; read it first.
    """

    mllm: str = positional()
    image: tuple[Path, ...] = positional()
    out: Path
    sites: tuple[str, ...] | None = None
    image_attention: str | None = None
    prefix: str | None = None
    image_px: Count | None = None
    overwrite: bool = False
    trust: bool = False


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """Options of `probes segment`.

    Args:
        probes: Folder of a finished probe run.
        photos: Image files with distinct names.
        site: Site of the probe (default: the run's best decoder layer).
        out: Folder for NAME.png (class indices), NAME_overlay.png, legend.png and legend.json; only files that this
            command has written are replaced.
        trust: Run the code of a run's model, FILE.py:FUNCTION or a mask of its own; read it first.
    """

    probes: Path = positional()
    photos: tuple[Path, ...] = positional()
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
        trust: Run the code of models, FILE.py:FUNCTION or masks of their own; read it first.
    """

    runs: tuple[str, ...] = positional(least=0, default=())
    mllm: str | None = None
    port: Port = 8899
    host: str | None = None
    trust: bool = False


@dataclass(frozen=True, kw_only=True)
class AssetsOptions:
    """Options of `probes demo-assets`.

    Args:
        out: Folder to write; replaces an earlier world.
        seed: Seed of all random choices.
        scenes: Scenes in a picture: 1, 2 or 4.
        scale: Factor for the number of images, conversations and training steps.
    """

    out: Path = positional()
    seed: Seed = 0
    scenes: Literal[1, 2, 4] = 4
    scale: Scale = 1.0


@dataclass(frozen=True, kw_only=True)
class PlantOptions:
    """Options of `probes plant`.

    Args:
        what: Recovery: train its image tokens on the classes; drop: merge classes in its adapter; random: shuffle the
            layers of its LLM.
        model: Exported directory (RUN/hf).
        world: Folder of demo-assets.
        out: Directory to write; replaces an earlier export.
        steps: Of recovery: optimizer steps on pictures alone.
        answer_steps: Of recovery: further steps in which questions about patches are trained, too.
        pairs: Of drop: pairs of classes to merge, up to 3; 0: none.
        seed: Seed of batches and questions.
    """

    what: Literal["recovery", "drop", "random"] = positional()
    model: Path = positional()
    world: Path = positional()
    out: Path = positional()
    steps: Index = 250
    answer_steps: Index = 0
    pairs: Literal[0, 1, 2, 3] = 3
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of `probes demo`.

    Args:
        out: Folder of world, models, study and report.
        seed: Seed of all random choices.
        scale: Factor for the number of images, conversations and training steps; 1: half an hour, large enough for
            results.
        extras: Also analyses that no claim needs (always from scale 1).
        masks: Masks to train under, each compared with the first; of the second the other models are made.
    """

    out: Path = Path("runs/demo")
    seed: Seed = 0
    scale: Scale = 0.1
    extras: bool = False
    masks: tuple[str, ...] = ("causal", "bidirectional")


@dataclass(frozen=True, kw_only=True)
class QuestionsOptions:
    """Options of `probes questions`.

    Args:
        data: Folder data set: images, masks and classes.json (probes/README.md, Your own data).
        out: Folder for captions.json, dialogues.json and questions.json.
        seed: Seed of all random choices.
        grid: Rows and columns of places that are asked about.
        per_photo: Questions about each training photo, on average.
        held_out: Questions about all validation photos.
    """

    data: Path = positional()
    out: Path
    seed: Seed = 0
    grid: Count = 4
    per_photo: Count = 6
    held_out: Count = 200
