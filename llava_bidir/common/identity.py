"""What a run was made from: data and models by content, and every setting that changes a result.

An identity is `{"data": {...}, "model": {...}, "settings": {...}}` with plain JSON values. It is stored in checkpoints
and in the results of a run, and compared by :func:`check_same_identity` before a run is resumed, called finished,
compared with another run, or analysed.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from .errors import USER_FILES, UserError
from .exported_masks import has_own_mask
from .files import read_json, sha256
from .hf import INDEX, TRAINING_JSON, read_model_config, weight_files

Identity = dict[str, dict[str, Any]]

# Settings that are not compared: they change no result beyond rounding, or are paths, whose content is compared
NOT_COMPARED = {
    "model": (
        "attn_implementation",
        "compile",
        "gradient_checkpointing",
        "max_new_tokens",
        "adapter",
        "encoder.path",
        "llm",
        "mllm",
        "trust",
    ),
    "data": (
        "cache_features",
        "name",
        "num_workers",
        "validation",  # the photos of each split are compared
        "groups",
        "annotations",
        "images",
        "root",
        "val_annotations",
    ),
    "solver": ("memory_gb",),
}
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
    trainer, module, data, trainer_settings: Sequence[str] = TRAINER_SETTINGS
) -> Identity:
    """Return the identity of a run: `data.identity()`, `module.models()` and the settings.

    Args:
        trainer: Has the values of `trainer_settings` as attributes.
        module: What is trained or solved, and the functions that users may have registered for it.
        data: Its images and targets, likewise.
        trainer_settings: Settings of the trainer that change a result.
    """
    registered = [*getattr(module, "registered", ()), *getattr(data, "registered", ())]
    of_trainer = {*trainer_settings} - {*getattr(data, "sets_on_trainer", ())}
    config = {
        "model": module.hparams,
        "data": data.hparams,
        "trainer": {key: getattr(trainer, key) for key in sorted(of_trainer)},
    }
    return {
        "data": data.identity(),
        "model": named_identity(module.models()),
        "settings": compared_settings(config) | code_of_user(*registered),
    }


def code_of_user(*parts: Any) -> dict[str, str]:
    """Return the checksums of the files of `--import` that functions and objects are of; of our own nothing."""
    modules = {sys.modules.get(getattr(part, "__module__", "")) for part in parts}
    files = {getattr(module, "__file__", None) for module in modules}
    names = files & {*USER_FILES}
    return {f"code of {Path(file).name}": sha256(Path(file))[:DIGITS] for file in names}


def compared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is compared of a config as YAML has it: as of runs, no setting that changes no result."""
    compared = {}
    for section, settings in config.items():
        if section in NOT_COMPARED:
            compared |= _settings(section, settings)
        elif section == "trainer":
            compared |= {
                f"trainer.{key}": plain(x) for key, x in settings.items() if key in TRAINER_SETTINGS
            }
        else:
            compared[section] = settings
    return compared


def _settings(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"SECTION.KEY": value} of what is compared; that of a group (encoder, lora) is "SECTION.GROUP.KEY"."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": setting for inner, setting in value.items()}
        elif not key.startswith("_"):
            flat[key] = value
    kept = flat.keys() - {*NOT_COMPARED[section]}
    # an option of a later version is None in earlier runs
    given = {key for key in kept if flat[key] is not None}
    return {f"{section}.{key}": plain(value) for key, value in flat.items() if key in given}


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


def plain(value: Any) -> Any:
    """Return `value` as JSON stores it: dataclasses as objects, tuples as lists."""
    return json.loads(json.dumps(value, default=lambda x: asdict(x) if is_dataclass(x) else str(x)))


def check_same_identity(
    saved: Identity | None, current: Identity, source: str, advice: str
) -> None:
    """Raise if two identities differ.

    Args:
        saved: Identity stored in `source`; None if it was trained from Python, on data that have none.
        current: Identity of this run.
        source: What `saved` belongs to, for the error.
        advice: What to do, the end of the error.

    Raises:
        UserError: Names the first difference.
    """
    if saved is None:
        raise UserError(f"{source} does not record its data and model; {advice}")
    for section in current:
        for key in sorted(saved[section].keys() | current[section].keys()):
            before, now = (identity[section].get(key) for identity in (saved, current))
            if json.dumps(before) != json.dumps(now):  # 1 batch is not the share 1.0
                name = key if section == "settings" else f"{section}.{key}"
                raise UserError(
                    f"{source} belongs to a run with {name}={before!r}, but this run has {now!r}; {advice}"
                )


def model_identity(key: str, path: str | Path) -> dict[str, str]:
    """Return {file: checksum} of a checkpoint directory, or {"": "ID@REVISION"} of a model on the hub.

    Raises:
        UserError: The directory contains no weights, or the hub has no such model.
    """
    folder = Path(path)
    if folder.is_dir():
        files = {*weight_files(folder)}
        for file in (file for pattern in MODEL_FILES for file in folder.glob(pattern)):
            if file.name not in NOT_MODEL_FILES and not file.name.endswith(INDEX):
                files.add(file)
        config = folder / "config.json"
        if config.is_file() and has_own_mask(read_json(config)):
            files.add(folder / "attention.py")
        return checksums(folder, sorted(os.path.relpath(file, folder) for file in files))
    return {"": f"{path}@{read_model_config(key, str(path))._commit_hash}"}


def describe_digest(content: Any, count: int | None = None) -> str:
    """Return "COUNT, sha256 DIGEST" of JSON values, e.g. of names and checksums."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGITS]
    if count is None:
        return f"sha256 {digest}"
    return f"{count:,}, sha256 {digest}"


def file_sizes(root: str, names: list[str]) -> list[int]:
    """Return the size of each file, -1 if it does not exist."""
    return _read_files(lambda path: path.stat().st_size, root=root, names=names, absent=-1)


def checksums(root: str | Path, names: Iterable[str]) -> dict[str, str]:
    """Return the checksum of each file by content, "" if it cannot be read; `names` are relative to `root`."""
    names = list(names)
    digests = _read_files(lambda path: sha256(path)[:DIGITS], root=root, names=names, absent="")
    return dict(zip(names, digests, strict=True))


def _read_files(
    function: Callable[[Path], Any], root: str | Path, names: list[str], absent: Any
) -> list[Any]:
    """Return a function's value for each file; threads hide the latency of shared file systems."""

    def read(name: str) -> Any:
        try:
            return function(Path(root, name))
        except OSError:  # reported with all other bad files when it is used
            return absent

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(read, names))
