"""Schema of metrics.json and manifest.json, used to write a run and to read one.

Fields are in the order of the files. Fields with a default are of some runs only. Other keys are ignored.
"""

from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic requires this one before Python 3.12
)

from pydantic import BaseModel, Field, PlainValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from llava_bidir.common.files import read_json
from llava_bidir.common.errors import UserError
from probes.tasks import SEGMENTATION


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> int | float:
    if not _is_number(value):
        raise ValueError("Input should be a valid number")
    return value


# of `ProbeModule`: those of the frozen model and its sites; the others say how probes are trained
MODEL_SETTINGS = (
    "mllm",
    "num_classes",
    "image_attention",
    "untrained",
    "match",
    "draw",
    "image_px",
    "image_resize",
    "dtype",
    "prefix",
    "sites",
    "seed",
)
Number = Annotated[Any, PlainValidator(_number)]  # `float` would convert 1 to 1.0
Grid = Annotated[list[Annotated[int, Field(ge=1, le=128)]], Field(min_length=2, max_length=2)]
Baseline = TypedDict(
    "Baseline",
    {
        "class": str,
        "miou": Number,
        "pacc": Number,
    },
)
Scores = dict.fromkeys(
    ("encoder", "adapter", "peak_llm", "peak_site", "delta_enc", "recovery"), Number | None
)
Summary = TypedDict(
    "Summary",
    Scores | {"peak_site": NotRequired[str | None], "final_norm": NotRequired[Number | None]},
)


class _ProbeSettings(BaseModel, extra="allow"):
    head: str
    feature_norm: str


class _Data(TypedDict):
    root: str
    dataset: str
    options: dict[str, Any]
    fingerprint: str
    labels: NotRequired[dict[str, dict[str, Any]]]  # by split, see probes/data/label_counts.py
    shared_images: NotRequired[list[list[str]]]  # names in training and in validation


class _Identity(TypedDict):
    data: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]


class ModelConfig(TypedDict):
    """The part of `Manifest.config` that is needed to load the model."""

    mllm: str
    image_attention: str | None
    untrained: list[str] | None
    image_resize: str
    dtype: str
    seed: int
    prefix: str | None
    match: str
    draw: int
    update_scales: list[Number] | None
    image_px: int | None


# the part of a checkpoint's training.json that reports use
ModelTraining = TypedDict(
    "ModelTraining",
    {
        "encoder": TypedDict("Encoder", {"name": str}),
        "llm": str,
        "name": str,
        "val/answer_accuracy": Number,
    },
    total=False,
)


class SiteScores(BaseModel, extra="allow"):
    """Scores of the probe at a site: SCORE and SCORE_ci95 for each score of the task; of classes, their IoUs too."""

    site: str
    dim: Annotated[int, Field(ge=1, le=1_000_000)]
    best_epoch: Number | None
    history: list[Number]
    iou_per_class: list[Number | None] | None = None


class RunnerUp(BaseModel):
    """The strength with the second lowest cross-validated loss, and how much it is behind the lowest."""

    strength: Number
    behind: Annotated[Number, Field(ge=0)]


class SitePath(BaseModel, extra="allow"):
    """Solved probes of a site along its strengths, from strong to weak.

    There is a list for the cross-validated loss and for each score; a score is None at a strength that was not solved.
    `chosen` is the strength of the site's probe, `lowest` that of the lowest cross-validated loss among `compared`.
    They differ only if the latter is at an end of the path. `runner_up` is the strength with the second lowest loss,
    and how many nats it is behind; None of a single strength. Other losses are less exact.
    """

    site: str
    strengths: Annotated[list[Number], Field(min_length=1)]
    chosen: Number
    lowest: Number
    compared: list[Number] = []
    runner_up: RunnerUp | None = None
    certificates: list[dict[str, Any] | None] = []


class PathOfSites(BaseModel):
    """The paths of all sites."""

    sites: list[SitePath]


class SolvedPath(BaseModel):
    """metrics.json["path"]: "closed_form" for least squares, else "optimum"."""

    passes: int
    sample_images: int | None = None
    optimum: PathOfSites | None = None
    closed_form: PathOfSites | None = None


class Metrics(BaseModel):
    """metrics.json: scores per site with intervals.

    `task` and `scores` are those of another task than segmentation: `scores` maps the names of its scores to "higher"
    or "lower", whichever is better, the main score first. `classes` and `baseline` are those of segmentation.
    """

    dataset: str
    split: str
    images: Annotated[int, Field(ge=1)]
    mllm: str
    model_kind: Literal["mllm", "encoder"]
    image_attention: str
    own_image_attention: str | None
    last_layer: str | None  # of the model, probed or not
    image_resize: str
    dtype: str
    untrained: list[str]
    match: str
    draw: int
    seed: int
    task: str = SEGMENTATION
    scores: Annotated[dict[str, Literal["higher", "lower"]], Field(min_length=1)] | None = None
    classes: Annotated[list[str], Field(min_length=1)] | None = None
    baseline: Baseline | None = None
    grid: Grid
    probe: _ProbeSettings
    sites: Annotated[list[SiteScores], Field(min_length=1)]
    summary: Summary
    path: SolvedPath | None = None


class Manifest(BaseModel):
    """manifest.json: versions, commit, configuration, data and hardware of a run."""

    versions: dict[str, Any]
    git_commit: str | None
    config: dict[str, Any]
    data: _Data
    identity: _Identity
    mllm_training: dict[str, Any] | None
    unread_notes: list[str] = []  # of a module: about its layers that are not read
    hardware: dict[str, Any]
    files: dict[str, str] | None = None  # SHA-256 of the other files that the run wrote


def check_schema(schema: Any, content: dict[str, Any], source: Path | str) -> None:
    """Raise a UserError that names `source` and the first invalid key unless `content` matches `schema`."""
    try:
        TypeAdapter(schema).validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = "".join(
            f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]
        ).lstrip(".")
        value = (
            "" if first["type"] == "missing" or not key else f", got {str(first['input'])[:50]!r}"
        )
        problem = first["msg"].removeprefix("Value error, ") + value
        raise UserError(
            f"{source}: {f'{key}: ' * bool(key)}{problem}; make the run again"
        ) from None


def read_run_file(schema: type[BaseModel], path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of a run.

    Raises:
        UserError: If the file is missing, damaged, or does not match `schema`.
    """
    content = read_json(path)
    check_schema(schema, content, path)
    return content
