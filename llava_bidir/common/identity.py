"""What a run was made from: data and models by content, and every setting that changes a result.

An identity is `{"data": {...}, "model": {...}, "settings": {...}}` with plain JSON values. It is stored in checkpoints
and in the results of a run, and compared by :func:`check_same_identity` before a run is resumed, called finished,
compared with another run, or analysed.
"""

import hashlib
import json
import os
from collections.abc import (
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .hf import (
    INDEX,
    TRAINING_JSON,
    find_weights,
    read_pretrained,
    weight_files,
)

Identity = dict[str, dict[str, Any]]

# Settings that may change when a run is resumed. Those of the first list change no result beyond rounding; what the
# paths of the second list lead to is compared by content. All other settings of model and data are compared.
MAY_CHANGE = {
    "model": ("attn_implementation", "compile", "gradient_checkpointing", "max_new_tokens"),
    "data": ("cache_features", "name", "num_workers"),
}
PATHS = {
    "model": ("adapter", "encoder.path", "llm", "mllm"),
    "data": ("annotations", "images", "root", "val_annotations"),
}
# Settings that say which model a checkpoint is of
OF_MODEL = (
    "encoder.name",
    "encoder.layer",
    "encoder.image_px",
    "image_attention",
    "image_resize",
    "image_px",
    "untrained",
    "match",
    "draw",
    "template",
)
# All other settings of the trainer (devices, strategy, logging, progress, checkpoints) may change.
TRAINER_SETTINGS = (
    "accumulate_grad_batches",
    "check_val_every_n_epoch",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_test_batches",
    "limit_train_batches",
    "limit_val_batches",
    "max_epochs",
    "max_steps",
    "overfit_batches",
    "precision",
    "val_check_interval",
)
MODEL_FILES = ("*.json", "*.model", "*.jinja")  # besides the weights
NOT_MODEL_FILES = (TRAINING_JSON, "generation_config.json")  # change no state
DIGITS = 16  # of a SHA-256 in hexadecimal, enough to tell files apart
THREADS = 16


def run_identity(
    trainer,
    module,
    data,
    trainer_settings: Sequence[str] = TRAINER_SETTINGS,
) -> Identity:
    """Return the identity of a run: `data.identity()`, `module.models()` and the settings.

    Args:
        trainer: Has the values of `trainer_settings` as attributes.
        module: What is trained or solved.
        data: Its images and targets.
        trainer_settings: Settings of the trainer that change a result.
    """
    settings = _settings(trainer, module, data, trainer_settings)
    return {
        "data": data.identity(),
        "model": named_identity(module.models()),
        "settings": settings,
    }


def named_identity(models: dict[str, str | dict[str, str]]) -> dict[str, str]:
    """Return {"NAME/FILE": checksum}, or {"NAME": "ID@REVISION"} for a model on the hub, of models by name.

    Args:
        models: Checkpoint directory or hub id by name, or what identifies a model that is no checkpoint.
    """
    identities = {
        name: model if isinstance(model, dict) else model_identity(f"model.{name}", model)
        for name, model in models.items()
    }
    return {
        f"{name}/{file}" if file else name: value
        for name, identity in identities.items()
        for file, value in identity.items()
    }


def _settings(
    trainer,
    module,
    data,
    trainer_settings: Sequence[str],
) -> dict[str, Any]:
    kept = {
        f"{section}.{key}": plain(value)
        for section, settings in (("model", module.hparams), ("data", data.hparams))
        for key, value in _flatten(settings)
        if key not in MAY_CHANGE[section] + PATHS[section] and not key.startswith("_")
    }
    own = getattr(data, "sets_on_trainer", ())
    return kept | {
        f"trainer.{key}": plain(getattr(trainer, key)) for key in trainer_settings if key not in own
    }


def _flatten(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings, those of a group (encoder, lora) as "GROUP.KEY"."""
    for key, value in settings.items():
        if isinstance(value, dict):
            for inner, setting in value.items():
                yield f"{key}.{inner}", setting
        else:
            yield key, value


def plain(value: Any) -> Any:
    """Return `value` as JSON stores it: dataclasses as objects, tuples as lists."""
    return json.loads(json.dumps(value, default=lambda x: asdict(x) if is_dataclass(x) else str(x)))


def check_same_identity(
    saved: Identity | None,
    current: Identity,
    source: str,
    advice: str,
    advice_of: Mapping[str, str] | None = None,
) -> None:
    """Raise if two identities differ.

    Args:
        saved: Identity stored in `source`; None if it was trained from Python, on data that have none.
        current: Identity of this run.
        source: What `saved` belongs to, for the error.
        advice: What to do, the end of the error.
        advice_of: What to do instead where these settings differ.

    Raises:
        UserError: Names the first difference.
    """
    if saved is None:
        raise UserError(
            f"{source} does not record its data and model (it was trained on data without an identity); {advice}"
        )
    for section in current:
        before = saved[section]
        now = current[section]
        for key in sorted(before.keys() | now.keys()):
            # 1 batch is not the share 1.0
            if json.dumps(before.get(key)) != json.dumps(now.get(key)):
                name = key if section == "settings" else f"{section}.{key}"
                raise UserError(
                    f"{source} belongs to a run with {name}={before.get(key)!r}, but this run has {now.get(key)!r}; "
                    f"{(advice_of or {}).get(key, advice)}"
                )


def check_same_model(
    saved: Identity | None,
    files: dict[str, str],
    options: dict[str, Any],
    source: str,
) -> None:
    """Raise if a checkpoint that is scored was trained with another model than the one that is built.

    Learning rates and data may differ: only the files of the models and the settings of `OF_MODEL` are compared, and
    of these only what both have.

    Args:
        saved: Identity stored in `source`; None if it was trained from Python, on data that have none.
        files: Checksums of the files of this command's models, see :func:`named_identity`.
        options: Those of its module.
        source: What `saved` belongs to, for the error.
    """
    if saved is None:
        return
    settings = {f"model.{key}": plain(value) for key, value in _flatten(options)}
    pairs = [("model", key, files[key]) for key in saved["model"].keys() & files.keys()]
    known = saved["settings"].keys() & settings.keys()
    described = [f"model.{key}" for key in OF_MODEL if f"model.{key}" in known]
    pairs += [("settings", key, settings[key]) for key in described]
    for section, key, now in pairs:
        before = saved[section][key]
        if before != now:
            name = key if section == "settings" else f"model.{key}"
            raise UserError(
                f"{source} was trained with {name}={before!r}, but this command has {now!r}; give the options of the "
                "training"
            )


def model_identity(key: str, path: str | Path) -> dict[str, str]:
    """Return {file: checksum} of a checkpoint directory, or {"": "ID@REVISION"} of a model on the hub.

    Raises:
        UserError: The directory contains no weights, or the hub has no such model.
    """
    folder = Path(path)
    if folder.is_dir():
        files = {find_weights(folder), *weight_files(folder)}
        for pattern in MODEL_FILES:
            found = (file for file in folder.glob(pattern) if file.name not in NOT_MODEL_FILES)
            files |= {file for file in found if not file.name.endswith(INDEX)}
        return checksums(folder, sorted(os.path.relpath(file, folder) for file in files))
    from transformers import AutoConfig

    return {"": f"{path}@{read_pretrained(key, AutoConfig, str(path))._commit_hash}"}


def describe_digest(content: Any, count: int | None = None) -> str:
    """Return "COUNT, sha256 DIGEST" of JSON values, e.g. of names and checksums."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGITS]
    return f"sha256 {digest}" if count is None else f"{count:,}, sha256 {digest}"


def file_sizes(root: Path, names: list[str]) -> list[int]:
    """Return the size of each file, -1 if it does not exist. Threads hide the latency of shared file systems."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_size, (os.path.join(root, name) for name in names), chunksize=1000))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def checksums(root: str | Path, names: Iterable[str]) -> dict[str, str]:
    """Return the checksum of each file by content, "" if it cannot be read; `names` are relative to `root`."""

    def checksum(name: str) -> str:
        try:
            with Path(root, name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]
        except OSError:  # reported with all other bad files when it is used
            return ""

    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(checksum, names), strict=True))
