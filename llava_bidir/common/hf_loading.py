"""Load untrusted Hugging Face checkpoints; errors name the file or key.

No code from a checkpoint is executed: no modelling code and no pickles. There is no option to allow it, since
transformers or this package has the class of every supported model. The checks apply to directories and to hub ids.
"""

import re
import warnings
from collections.abc import Iterable
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import UserError, error_context

if TYPE_CHECKING:  # seconds, which commands that only read results do not need
    from transformers import PreTrainedConfig, PreTrainedModel

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


def _is_default(part: str, config: "PreTrainedConfig", given: dict[str, Any]) -> bool:
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


def _check_vocabulary(key: str, loaded, path: str) -> None:
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


def check_merged(key: str, path: str, revision: str | None = None) -> None:
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


def warn_of_slow_dtype(key: str, path: str, dtype: torch.dtype) -> None:
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
