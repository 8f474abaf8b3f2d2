"""Schema of metrics.json and manifest.json, used to write a run and to read one.

Fields are in the order of the files. Optional fields are missing in older runs. Extra keys are allowed.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import read_json

MAX_BYTES = 200_000_000  # 34 sites with 150 classes need 200 kB
# Keys of earlier versions. Probe variants are stored under "recipes".
OLD_KEYS = {"image_aspect": "image_resize", "mllm_dtype": "dtype", "recipes": "variants"}


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("Input should be a valid number")
    return value


Number = Annotated[Any, PlainValidator(_number)]  # not `float`, which would turn 1 into 1.0
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]
GridSize = Annotated[int, Field(ge=1, le=128)]


class RunPart(BaseModel):
    """Base class: strict types, and extra keys are kept."""

    model_config = ConfigDict(strict=True, extra="allow")


class ProbeSettings(RunPart):
    """How the probes of a variant were trained."""

    head: str
    feature_norm: str


class SiteScores(RunPart):
    """Scores of the probe at a site."""

    site: str
    dim: Annotated[int, Field(ge=1, le=1_000_000)]
    miou: Number
    miou_ci95: Interval
    pacc: Number
    pacc_ci95: Interval
    best_epoch: Number | None
    iou_per_class: list[Number | None]
    history: list[Number]
    states: dict[str, Any] = {}


class Baseline(RunPart):
    """Scores of predicting the most frequent class everywhere."""

    class_: str = Field(alias="class")
    miou: Number
    pacc: Number


class Summary(RunPart):
    """Encoder, adapter and peak layer, see `probes.evaluation.metrics.summary`."""

    encoder: Number | None
    adapter: Number | None
    peak_llm: Number | None
    peak_site: str | None = None
    delta_enc: Number | None
    recovery: Number | None


class VariantResults(RunPart):
    """Results of a further probe variant."""

    probe: ProbeSettings
    sites: list[SiteScores]
    summary: dict[str, Any] = {}


class Metrics(RunPart):
    """metrics.json: scores per site with intervals."""

    dataset: str
    split: str = "validation"
    images: Annotated[int, Field(ge=1)]
    mllm: str
    image_attention: str
    own_image_attention: str | None = None
    image_resize: str | None = None
    untrained: list[str]
    seed: int
    classes: Annotated[list[str], Field(min_length=1)]
    baseline: Baseline
    grid: Annotated[list[GridSize], Field(min_length=2, max_length=2)]
    probe: ProbeSettings
    sites: Annotated[list[SiteScores], Field(min_length=1)]
    summary: Summary
    recipes: dict[str, VariantResults] = {}

    @model_validator(mode="after")
    def _check_agreement(self) -> "Metrics":
        for key, names in (("classes", self.classes), ("sites", [site.site for site in self.sites])):
            if len(set(names)) != len(names):
                raise ValueError(f"{key} contains duplicates")
        for site in self.sites:
            if len(site.iou_per_class) != len(self.classes):
                raise ValueError(f"iou_per_class of {site.site!r} does not have one value per class")
        return self


class DataSource(RunPart):
    """The dataset of a run."""

    root: str
    dataset: str
    options: dict[str, Any] | None = None
    fingerprint: str


class Manifest(RunPart):
    """manifest.json: versions, commit, configuration, data and hardware of a run."""

    versions: dict[str, Any]
    git_commit: str | None = None
    config: dict[str, Any]
    data: DataSource
    mllm_training: dict[str, Any] | None
    hardware: dict[str, Any] = {}


class ModelConfig(RunPart):
    """The part of `Manifest.config` that is needed to load the model."""

    mllm: str
    image_attention: str | None
    untrained: list[str] | None
    image_resize: str
    dtype: str
    seed: int


class EncoderTraining(RunPart):
    """The encoder in training.json."""

    name: str


class ModelTraining(RunPart):
    """The part of a checkpoint's training.json that reports use."""

    encoder: EncoderTraining = None
    llm: str = None
    answer_accuracy: Number = Field(None, alias="val/answer_accuracy")


def validate(schema: type[RunPart], content: dict[str, Any], source: Path | str) -> Any:
    """Return `content` as a `schema`.

    Raises:
        UserError: If it does not match; the message names `source` and the first invalid key.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]).lstrip(".")
        value = "" if first["type"] == "missing" or not key else f", got {str(first['input'])[:50]!r}"
        problem = first["msg"].removeprefix("Value error, ") + value
        raise UserError(f"{source}: {f'{key}: ' * bool(key)}{problem}; make the run again") from None


def read_run_file(schema: type[RunPart], path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of a run after validation.

    Raises:
        UserError: If the file is missing, damaged, or does not match `schema`.
    """
    content = read_json(path, MAX_BYTES)
    validate(schema, content, path)
    return content


def dump(part: RunPart) -> dict[str, Any]:
    """Return what is written to the JSON file: fields in order, without those that were not set."""
    return part.model_dump(by_alias=True, exclude_unset=True)


def rename_old_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return `Manifest.config` with the current names of options; the value "square" is now "squash"."""
    config = {OLD_KEYS.get(key, key): value for key, value in config.items()}
    return config | {"image_resize": "squash"} if config.get("image_resize") == "square" else config
