"""Load untrusted Hugging Face checkpoints, and check what a model computes; errors name the file or key.

No code from a checkpoint is executed: no modelling code and no pickles. There is no option to allow it, since
transformers or this package has the class of every supported model. The checks apply to directories and to hub ids.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import UserError, error_context
from .files import read_json

if TYPE_CHECKING:  # seconds, which commands that only read results do not need
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

# Modules that register the config of a model_type with transformers
OWN_CONFIGS = {"llava_bidir": "llava_bidir.model.configuration_llava_bidir"}
PARTS = ("vision_config", "text_config")
AUTHORS_KEYS = ("mm_vision_tower", "mm_projector_type")  # in config.json of LLaVA's authors
PEFT_PREFIX = "base_model.model."  # of the names of tensors in peft's files
MERGE = (
    "merge updates into the weights (peft: merge_and_unload) and save the result, or use the checkpoint in bfloat16, "
    "float16 or float32"
)
PROMPT_DATE = date(2025, 1, 1)
_PARTS = "".join(
    f"|replace('%{part}', '{PROMPT_DATE.strftime('%' + part)}')" for part in "YymdBbAajHMS"
)
FIXED_DATE = "{% macro strftime_now(format) %}{{ format" + _PARTS + " }}{% endmacro %}\n"
CONVERTED = "Use the checkpoint's conversion to transformers' format, for LLaVA those of llava-hf"


def read_pretrained(
    key: str,
    reader: type,
    path: str,
    **kwargs,
):
    """Return `reader.from_pretrained(path)`, a config, tokenizer or processor.

    Args:
        key: Name for errors: a key of the config or an argument.
        reader: A class of transformers.
        path: Directory or hub id.
        **kwargs: Passed to `from_pretrained`.

    Raises:
        UserError: The checkpoint does not exist, is damaged, has no vocabulary, or requires code from the checkpoint.
    """
    is_local = Path(path).is_dir()
    if is_local and reader.__name__ == "AutoConfig" and not (Path(path) / "config.json").is_file():
        raise UserError(
            f"{path} contains no config.json; expected a Hugging Face checkpoint such as RUN/hf"
        )
    if is_local:
        subject = path
    else:
        subject = f"{path!r} is neither a checkpoint directory nor a hub id that can be loaded"
    with error_context(f"{key}: {subject}"):
        if reader.__name__ == "AutoConfig":
            return _read_config(path, **kwargs)
        loaded = reader.from_pretrained(path, trust_remote_code=False, **kwargs)
    _check_vocabulary(key, loaded, path)
    for part in (loaded, getattr(loaded, "tokenizer", None)):
        template = getattr(part, "chat_template", None)
        if isinstance(template, dict):
            part.chat_template = {name: with_fixed_date(text) for name, text in template.items()}
        elif template:
            part.chat_template = with_fixed_date(template)
    return loaded


def with_fixed_date(template: str) -> str:
    """Return a chat template with `PROMPT_DATE` for the date of the day, also where plain transformers renders it.

    Prompts, and with them trained weights and states, would differ from day to day.
    """
    if "strftime_now" not in template or "macro strftime_now" in template:
        return template
    return FIXED_DATE + template


def _read_config(path: str, **kwargs) -> "PreTrainedConfig":
    """Return the config of a checkpoint, all parts of which are in its config.json.

    Where a part is absent, transformers takes its defaults: LLaVA-1.5-13B of LLaVA's authors, whose config has other
    keys, would be described as a model of 32 layers.

    Raises:
        UserError: transformers does not know the kind of model, or its config.json lacks the encoder's or the LLM's.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, __version__

    given, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
    kind = given.get("model_type")
    if kind in OWN_CONFIGS:
        import_module(OWN_CONFIGS[kind])
    of_authors = any(name in given for name in AUTHORS_KEYS)
    if of_authors:
        raise UserError(
            f"config.json is in the format of LLaVA's authors (model_type {kind!r}). {CONVERTED}"
        )
    if kind is not None and kind not in CONFIG_MAPPING and "auto_map" not in given:
        raise UserError(
            f"transformers {__version__} knows no model_type {kind!r}; a later version may"
        )
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **kwargs)
    if missing := [name for name in PARTS if _is_default(name, config, given)]:
        absent = " and no ".join(missing)
        raise UserError(
            f"config.json has no {absent}, for which transformers would take its defaults. {CONVERTED}"
        )
    return config


def _is_default(
    part: str,
    config: "PreTrainedConfig",
    given: dict[str, Any],
) -> bool:
    """Return whether transformers made a part of a config of its defaults, since config.json has nothing for it."""
    made = getattr(config, part, None)
    if part not in config.sub_configs or made is None:
        return False
    # the latter of early CLIPs
    if isinstance(given.get(part), dict) or isinstance(given.get(f"{part}_dict"), dict):
        return False
    # that early configs, as of Qwen2-VL, have beside the encoder's
    sizes = ("hidden_size", "num_hidden_layers")
    return any(
        given.get(size) is None or given[size] != getattr(made, size, None) for size in sizes
    )


def _check_vocabulary(
    key: str,
    loaded,
    path: str,
) -> None:
    """Raise if a tokenizer has special tokens only; transformers builds one where the vocabulary file is missing."""
    tokenizer = getattr(loaded, "tokenizer", loaded)
    if hasattr(tokenizer, "get_vocab"):
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        if not tokenizer.get_vocab().keys() - special:
            files = ", ".join(sorted(tokenizer.vocab_files_names.values()))
            raise UserError(f"{key}: {path} contains no vocabulary; expected one of {files}")


def load_weights(
    key: str,
    reader: type,
    path: str,
    **kwargs,
) -> "PreTrainedModel":
    """Return the model `reader.from_pretrained(path)` with all weights taken from the checkpoint and finite.

    transformers initialises missing weights at random and only logs it, so a model without its LLM would run. It leaves
    out tensors that it does not expect: updates and scales without which the weights are of another model.

    Args:
        key: Name for errors.
        reader: An Auto class or a model class.
        path: Directory or hub id.
        **kwargs: Passed to `from_pretrained`.

    Raises:
        UserError: Weights are damaged, missing, not finite, of other shapes, of more layers than the config has, not
            merged with their updates, or quantised in a way that the config does not state.
    """
    check_merged(key, path, kwargs.get("revision"))
    with error_context(f"{key}: {path}"):
        model, info = reader.from_pretrained(
            path,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )

    check_layers_complete(key, path, model, info["unexpected_keys"])

    def numbered(name):
        return re.sub(r"\d+", "#", name)

    expected = {numbered(name) for name in model.state_dict()}
    faults = {
        "lacks": info["missing_keys"],
        "has shapes that differ from its config in": {name for name, *_ in info["mismatched_keys"]},
        "has more layers than its config, in": {
            n for n in info["unexpected_keys"] if numbered(n) in expected
        },
        "has values that are not finite in": {
            n for n, p in model.named_parameters() if not is_finite(p)
        },
    }
    for fault, names in faults.items():
        if names:
            raise UserError(
                f"{key}: the checkpoint {path} {fault} {len(names)} tensors, e.g. {min(names)}; download it again or "
                "correct its config.json"
            )
    warn_of_slow_dtype(key, path, model.dtype)
    return model


def check_merged(
    key: str,
    path: str,
    revision: str | None = None,
) -> None:
    """Raise if a checkpoint has updates of peft beside its weights.

    transformers adds their layers to the model, or ignores the updates if peft is not installed.
    """
    from transformers.utils import find_adapter_config_file

    if file := find_adapter_config_file(path, revision=revision):
        raise UserError(
            f"{key}: {path} has updates of peft beside its weights, see its {Path(file).name}; {MERGE}"
        )


def check_layers_complete(
    key: str,
    path: str,
    model: torch.nn.Module,
    unexpected: Iterable[str],
) -> None:
    """Raise if a checkpoint has tensors of a layer that the model's layer lacks: LoRA updates, scales, biases.

    Tensors of modules that the model lacks are left out: a text model beside an encoder, for example.
    """
    layers = {
        name
        for name, module in model.named_modules()
        if next(module.children(), None) is None and next(module.parameters(), None) is not None
    }

    def is_inside(name: str) -> bool:
        steps = name.removeprefix(PEFT_PREFIX).split(".")
        return any(".".join(steps[:i]) in layers for i in range(1, len(steps)))

    if names := [*filter(is_inside, unexpected)]:
        raise UserError(
            f"{key}: the checkpoint {path} has LoRA updates, scales of quantised weights, or biases that the model of "
            f"its config.json would ignore, in {len(names)} tensors, e.g. {min(names)}; {MERGE}"
        )


def warn_of_slow_dtype(
    key: str,
    path: str,
    dtype: torch.dtype,
) -> None:
    """Warn of weights of 16 bits that this CPU takes several times as long to compute with as with others."""
    fast = torch.float32 if torch.backends.cpu.get_cpu_capability() == "AVX2" else torch.bfloat16
    if dtype not in (torch.float32, fast) and not torch.cuda.is_available():
        slow = str(dtype).removeprefix("torch.")
        name = str(fast).removeprefix("torch.")
        warnings.warn(
            f"{key}: {path} is computed in {slow}, which takes this CPU up to ten times as long as {name}; consider "
            f"`--model.dtype {name}`, for `llava-bidir generate` `--dtype {name}`",
            stacklevel=3,
        )


def is_finite(parameter: torch.Tensor) -> bool:
    """Return False if a weight is NaN or infinite. No copy is made."""
    # ZeRO-3 leaves 0 elements in place
    if not parameter.is_floating_point() or parameter.numel() == 0:
        return True
    return all(extreme.isfinite() for extreme in torch.aminmax(parameter.detach()))


INDEX = (
    ".index.json"  # end of the name of a file that lists the files of a checkpoint in several parts
)
# in the order in which transformers looks for them
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_weights(directory: Path) -> Path:
    """Return the file of weights, or the index of several files, that transformers reads in a directory.

    Raises:
        UserError: There is none.
    """
    config = directory / "config.json"
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    names = NAMES if named is None else (str(named),)
    file = next((directory / name for name in names if (directory / name).is_file()), None)
    if file is None:
        raise UserError(f"{directory} contains no weights; expected one of {', '.join(names)}")
    return file


def weight_files(directory: Path) -> list[Path]:
    """Return the files with the weights of a checkpoint: safetensors, or else pickles of tensors.

    Raises:
        UserError: There are none, or the index is damaged or names a file that does not exist.
    """
    file = find_weights(directory)
    if not file.name.endswith(INDEX):
        return [file]
    parts = read_json(file).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise UserError(f"{file}: expected weight_map, an object of file names by tensor")
    files = sorted({directory / name for name in parts.values()})
    for part in files:
        if not part.is_file():
            raise UserError(
                f"{file} names {part.name}, which does not exist; download the checkpoint again"
            )
    return files


def read_tensors(directory: Path, part: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint directory whose names contain `part`; the others are not read.

    Raises:
        UserError: The directory has no weights, or a weight file is damaged.
    """
    matches = {}
    for file in weight_files(directory):
        with error_context(file):
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as tensors:
                    matches |= {
                        name: tensors.get_tensor(name) for name in tensors.keys() if part in name
                    }
            else:
                tensors = torch.load(
                    file,
                    map_location="cpu",
                    mmap=True,
                    weights_only=True,
                )
                matches |= {name: tensor for name, tensor in tensors.items() if part in name}
    return matches


def greedy_config(
    own: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase"
) -> "GenerationConfig":
    """Return settings of greedy decoding: of a checkpoint's own settings, the token ids only.

    The token that ends the answers in training also ends generation. Penalties, forced and suppressed tokens, minimum
    lengths and the like are dropped.

    Args:
        own: Generation settings of the checkpoint, or of its LLM.
        tokenizer: Tokenizer of the checkpoint.
    """
    from transformers import GenerationConfig

    pad = own.pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ends = end_tokens(own, tokenizer)
    return GenerationConfig(
        bos_token_id=own.bos_token_id,
        pad_token_id=pad,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
    )


class FiniteLogits:
    """Logits processor of `generate` that raises on NaN and infinite logits, and changes none.

    Of such logits the first token would be the largest, which ends an answer or fills it.
    """

    def __call__(
        self,
        input_ids: Tensor,
        scores: Tensor,
    ) -> Tensor:
        """Return the logits f32[B, V] of the next tokens; raise a UserError unless the largest ones are finite."""
        # tokens that a checkpoint's settings suppress have -inf
        check_outputs("logits", {"the output head": scores.amax(-1)})
        return scores


def end_tokens(own: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids of the tokens that end an answer, sorted."""
    ids = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return sorted({*ids, tokenizer.eos_token_id} - {None})


DTYPE_ADVICE = (
    "numbers above 65,504 overflow float16: use bfloat16 or float32 (`--model.dtype`, of `llava-bidir generate` "
    "`--dtype`, in Python `dtype`)"
)


def check_outputs(kind: str, outputs: Mapping[str, Tensor]) -> None:
    """Raise if what is read from a model is NaN or infinite. The host waits for the device once.

    Args:
        kind: "states" or "logits", for the error.
        outputs: Floats of any shape by site, in forward order, on one device.

    Raises:
        UserError: Names the first site with such a value, and the dtypes to use.
    """
    with_values = {site: output.detach() for site, output in outputs.items() if output.numel()}
    if not with_values:
        return
    # a tenth of the time of isfinite, and without a copy; NaN is the extreme of whatever holds it
    finite = [torch.stack(output.aminmax()).isfinite().all() for output in with_values.values()]
    finite = torch.stack(finite).tolist()
    for site, is_finite in zip(with_values, finite, strict=True):
        if not is_finite:
            raise UserError(f"the {kind} at {site} are NaN or infinite; {DTYPE_ADVICE}")


TRAINING_JSON = "training.json"


def read_training(checkpoint: Path) -> dict[str, Any]:
    """Return the training.json of a checkpoint, {} if it has none, as checkpoints that others have released.

    Raises:
        UserError: The file is not JSON.
    """
    file = checkpoint / TRAINING_JSON
    return read_json(file) if file.is_file() else {}
