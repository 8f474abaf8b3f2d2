"""Reads checkpoints that somebody else made. What is wrong with one is an error that names the file.

Nothing that lies in a directory is executed: no modelling code, no pickles. There is no switch for it, since
transformers has the class of every model that is read here, and this package has its own.
"""

import copy
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .errors import UserError

CONFIG_BYTES = 10_000_000
# Keys whose number is a number of objects that transformers makes as soon as it reads them, and what is absurd there.
COUNTS, MOST = re.compile(r"(layers|depth|num_labels|num_experts)$"), 4096


@contextmanager
def error_context(what: Any) -> Iterator[None]:
    """Whatever a library raises inside, over a file that may say anything, is a ValueError that names it."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        if "trust_remote_code" in str(error):
            lines = ["it needs code that lies in it, and code found in a checkpoint is never executed here"]
        kind = "" if type(error) in (ValueError, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{what}: {kind}{' '.join(lines[:3])[:500]}") from error


def read_json(file: Path, most_bytes: int = CONFIG_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: The file is larger than `most_bytes`, not UTF-8, not JSON, or not an object.
    """
    with error_context(file):
        if file.stat().st_size > most_bytes:
            raise UserError(f"{file.stat().st_size:,} bytes, where {most_bytes:,} are plenty")
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise UserError(f"holds a {type(content).__name__}; expected an object {{...}}")
    return content


def check_config(directory: Path) -> None:
    """Looks at config.json before transformers does, which makes as many objects as it says.

    Raises:
        UserError: There is none, it is no JSON object, or it asks for thousands of layers or labels.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{directory} holds no config.json; expected a Hugging Face checkpoint, RUN/hf for one")
    rest = [read_json(file)]
    while rest:
        for key, value in rest.pop().items():
            if isinstance(value, dict):
                rest.append(value)
            elif COUNTS.search(key) and isinstance(value, int) and value > MOST:
                raise UserError(f"{file}: {key} is {value:,}; no model has more than {MOST:,}")


def read_pretrained(key: str, reader: type, path: str, **kwargs):
    """`reader.from_pretrained(path)` of a config, tokenizer or processor.

    Args:
        key: What the error calls it: a key of the config, an argument.
        reader: A class of transformers.
        path: Directory or hub id.

    Raises:
        UserError: There is no such checkpoint, a file of it is damaged, or it needs code that lies in it.
    """
    if Path(path).is_dir():
        if reader is AutoConfig or (Path(path) / "config.json").is_file():  # a tokenizer may lie by itself
            check_config(Path(path))
        with error_context(f"{key}: {path}"):
            found = reader.from_pretrained(path, trust_remote_code=False, **kwargs)
        _check_vocabulary(key, found, Path(path))
        return found
    try:
        with error_context(key):
            return reader.from_pretrained(path, trust_remote_code=False, **kwargs)
    except ValueError as error:
        raise UserError(
            f"{key}: {path!r} is neither a checkpoint directory nor a model that the hub or its cache has ({error})"
        ) from error


def _check_vocabulary(key: str, found, directory: Path) -> None:
    """transformers makes a tokenizer without words where it finds no file of them."""
    files = getattr(getattr(found, "tokenizer", found), "vocab_files_names", {}).values()
    if files and not any((directory / file).is_file() for file in files):
        raise UserError(f"{key}: {directory} holds no vocabulary, that is, none of {', '.join(sorted(files))}")


def load_weights(key: str, reader: type, path: str, config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
    """`reader.from_pretrained(path)` of a model, all of whose weights come from the checkpoint and are finite.

    transformers draws what a checkpoint lacks and only logs it: a model without its LLM would run, and be random.

    Args:
        key: What the error calls it.
        reader: A model class of transformers or an Auto class.
        path: Directory or hub id.
        config: Of the model, from :func:`read_pretrained`.

    Raises:
        UserError: Weights are damaged, missing, of other shapes, not finite, or of more layers than the config has; or
            the config describes a larger model than there are weights for, before memory is taken for it.
    """
    if Path(path).is_dir():
        _check_size(reader, config, Path(path))
    with error_context(f"{key}: {path}"):
        model, found = reader.from_pretrained(
            path, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    numbered = lambda name: re.sub(r"\d+", "#", name)
    expected = {numbered(name) for name in model.state_dict()}
    faults = {
        "lacks": found["missing_keys"],
        "has other shapes than its config says, in": {name for name, *_ in found["mismatched_keys"]},
        "has more layers than its config, which does not know": {
            name for name in found["unexpected_keys"] if numbered(name) in expected
        },
        "has numbers that are not finite in": {n for n, p in model.named_parameters() if not _finite(p)},
    }
    for fault, names in faults.items():
        if names:
            raise UserError(
                f"{key}: the checkpoint {path} {fault} {len(names)} tensors, {min(names)} for one; take another copy "
                "of it, or correct its config.json"
            )
    return model


def _check_size(reader: type, config: PreTrainedConfig, directory: Path) -> None:
    """The parameters of the model that the config describes must fit in the files, at a byte each."""
    available = sum(file.stat().st_size for file in weight_files(directory))
    with error_context(directory / "config.json"), torch.device("meta"):
        model_class = reader._model_mapping[type(config)] if hasattr(reader, "_model_mapping") else reader
        needed = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
        if needed > available:
            raise UserError(f"it describes {needed:,} parameters, but the weights have {available:,} bytes")


def weight_files(directory: Path) -> list[Path]:
    """The files with a checkpoint's weights, opened once.

    Raises:
        UserError: There are none, one is damaged or holds code, or the index names a file that is not beside it.
    """
    files = [*sorted(directory.glob("*.safetensors")), *sorted(directory.glob("pytorch_model*.bin"))]
    if not files:
        raise UserError(f"{directory} holds no weights: neither *.safetensors nor pytorch_model*.bin")
    for file in files:
        if file.suffix == ".safetensors":
            with error_context(f"{file} is damaged; take another copy of it"), safe_open(file, "pt"):
                pass
        elif zipfile.is_zipfile(file):  # as torch writes them since 1.6
            check_pickle(file)
    for index in [*directory.glob("*.safetensors.index.json"), *directory.glob("*.bin.index.json")]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: weight_map is no object of tensor names and files")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not (directory / file).is_file():
                raise UserError(f"{index}: {name} is said to be in {file!r}, which is no file beside it")
    return files


def check_pickle(file: Path, allowed: tuple[str, ...] = ()) -> None:
    """Looks through what torch.save wrote without loading it.

    Args:
        file: A zip archive with a pickle inside.
        allowed: Names of classes and functions beside those that `torch.load(weights_only=True)` knows.

    Raises:
        UserError: It is damaged, or names other classes and functions, which loading would call.
    """
    with error_context(f"{file} is damaged or not written by torch.save; take another copy of it"):
        called = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - set(allowed)
    if called:
        raise UserError(
            f"{file} holds code: loading it would call {', '.join(sorted(called))}. Checkpoints are data; get it from "
            "somewhere else"
        )


def _finite(parameter: torch.Tensor) -> bool:
    if not parameter.is_floating_point() or parameter.numel() == 0:  # ZeRO-3 leaves 0 elements in place
        return True
    return all(extreme.isfinite() for extreme in torch.aminmax(parameter.detach()))
