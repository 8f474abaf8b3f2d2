"""Load untrusted Hugging Face checkpoints, and check what a model computes; errors name the file or key.

No code from a checkpoint is executed: no modelling code and no pickles. There is no option to allow it, since
transformers or this package has the class of every supported model. Only the function of a mask of one's own is, and
only if the user trusts it (exported_masks.py). The checks apply to directories and to hub ids.
"""

import math
import re
import sys
from collections.abc import Mapping
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import UserError, error_context
from .exported_masks import register_own_mask
from .files import read_json

if TYPE_CHECKING:  # seconds, which commands that only read results do not need
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

OWN_CONFIG = "llava_bidir.model.configuration_llava_bidir"  # registers itself with transformers
CONFIG_PARTS = ("vision_config", "text_config")
PEFT_PREFIX = "base_model.model."  # of the names of tensors in peft's files
MERGE = (
    "merge updates into the weights (peft: merge_and_unload) and save the result, or use the checkpoint in bfloat16, "
    "float16 or float32"
)
PROMPT_DATE = date(2025, 1, 1)
_DATE_FIELDS = "".join(
    f"|replace('%{field}', '{PROMPT_DATE.strftime('%' + field)}')" for field in "YymdBbAajHMS"
)
FIXED_DATE = "{% macro strftime_now(format) %}{{ format" + _DATE_FIELDS + " }}{% endmacro %}\n"


def read_pretrained(key: str, reader: type, path: str, **kwargs):
    """Return `reader.from_pretrained(path)`, a tokenizer, a processor, or a config of a class.

    Args:
        key: Name for errors: a key of the config or an argument.
        reader: A class of transformers; :func:`read_model_config` is for its AutoConfig.
        path: Directory or hub id.
        **kwargs: Passed to `from_pretrained`.

    Raises:
        UserError: The checkpoint does not exist, is damaged, has no vocabulary, or requires code from the checkpoint.
    """
    with error_context(f"{key}: {path}"):
        loaded = reader.from_pretrained(path, trust_remote_code=False, **kwargs)
        tokenizer = getattr(loaded, "tokenizer", loaded)
        _check_vocabulary(tokenizer)
    for part in (loaded, tokenizer):
        if template := getattr(part, "chat_template", None):
            part.chat_template = with_fixed_date(template)
    return loaded


def with_fixed_date(template: str) -> str:
    """Return a chat template with `PROMPT_DATE` for the date of the day.

    Prompts, and with them trained weights and states, would differ from day to day. Plain transformers renders it, too.
    """
    if "strftime_now" not in template or "macro strftime_now" in template:
        return template
    return FIXED_DATE + template


def read_model_config(
    key: str, path: str, *, trust: bool = False, **hub: Any
) -> "PreTrainedConfig":
    """Return the config of a checkpoint, all parts of which are in its config.json.

    Where a part is absent, transformers takes its defaults: LLaVA-1.5-13B of LLaVA's authors, whose config has other
    keys, would be described as a model of 32 layers.

    Args:
        key: Name for errors.
        path: Directory or hub id.
        trust: Whether the code of a mask of its own may be run.
        **hub: `revision` of a hub id.

    Raises:
        UserError: There is none, transformers does not know its kind, it lacks the encoder's or the LLM's part, the
            encoder lacks the layer that is read, or its mask is in code that is not trusted.
    """
    from transformers import AutoConfig, PreTrainedConfig

    import_module(OWN_CONFIG)
    with error_context(f"{key}: {path}"):
        given, _ = PreTrainedConfig.get_config_dict(path, **hub)
        register_own_mask(path, given, trust=trust, **hub)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
        if missing := [name for name in CONFIG_PARTS if _is_default(name, config, given)]:
            absent = " and no ".join(missing)
            raise UserError(
                f"config.json has no {absent}, for which transformers would take its defaults. Use the checkpoint's "
                "conversion to transformers' format, for LLaVA those of llava-hf"
            )
        layers = getattr(config, "vision_feature_layer", None) or []
        for layer in [layers] if isinstance(layers, int) else layers:
            # timm's, as of FastVLM, do not say it
            depth = getattr(config.vision_config, "num_hidden_layers", math.inf)
            if not -depth - 1 <= layer <= depth:
                raise UserError(f"vision_feature_layer {layer}: the encoder has {depth} layers")
    return config


def _is_default(part: str, config: "PreTrainedConfig", given: dict[str, Any]) -> bool:
    """Return whether transformers made a part of a config of its defaults, since config.json has nothing for it."""
    made = getattr(config, part, None)
    if part not in config.sub_configs or made is None or isinstance(given.get(part), dict):
        return False
    # that early configs, as of Qwen2-VL, have beside the encoder's
    sizes = ("hidden_size", "num_hidden_layers")
    return any(given.get(size) != getattr(made, size, "") for size in sizes)


def _check_vocabulary(tokenizer) -> None:
    """Raise if a tokenizer has special tokens only; transformers builds one where the vocabulary file is missing."""
    if hasattr(tokenizer, "get_vocab"):
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        if not tokenizer.get_vocab().keys() - special:
            files = ", ".join(sorted(tokenizer.vocab_files_names.values()))
            raise UserError(f"there is no vocabulary; expected one of {files}")


def load_weights(key: str, reader: type, path: str, **kwargs) -> "PreTrainedModel":
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
            merged with their updates, in two files, or quantised in a way that the config does not state.
    """
    from transformers.utils.hub import cached_file

    check_merged(key, path, kwargs.get("revision"))
    with error_context(f"{key}: {path}"):
        model, info = reader.from_pretrained(
            path,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    if "gguf_file" not in kwargs:
        config_file = cached_file(path, "config.json", revision=kwargs.get("revision"))
        tensor_files(Path(config_file).parent)  # raises

    def is_inside(name: str) -> bool:
        """Return whether a tensor is one of a layer that the model has, or of a further one of its kind."""
        steps = _numbered(name.removeprefix(PEFT_PREFIX)).split(".")
        return any(".".join(steps[:i]) in layers for i in range(1, len(steps)))

    layers = {
        _numbered(name)
        for name, module in model.named_modules()
        if [*module.parameters()] and not [*module.children()]
    }
    faults = {
        "lacks": info["missing_keys"],
        "has shapes that differ from its config in": [name for name, *_ in info["mismatched_keys"]],
        "has updates, scales or biases, or more layers than its config, which would be ignored: in": [
            *filter(is_inside, info["unexpected_keys"])
        ],
        "has values that are not finite in": [
            n for n, p in model.named_parameters() if not is_finite(p)
        ],
    }
    for fault, names in faults.items():
        if names:
            raise UserError(
                f"{key}: the checkpoint {path} {fault} {len(names)} tensors, e.g. {min(names)}; download it again, "
                f"correct its config.json, or {MERGE}"
            )
    return model


def _numbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def check_merged(key: str, path: str, revision: str | None = None) -> None:
    """Raise if a checkpoint has updates of peft beside its weights.

    transformers adds their layers to the model, or ignores the updates if peft is not installed.
    """
    from transformers.utils import find_adapter_config_file

    if file := find_adapter_config_file(path, revision=revision):
        raise UserError(
            f"{key}: {path} has updates of peft beside its weights, see its {Path(file).name}; {MERGE}"
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
WEIGHT_FILES = tuple(  # in the order in which transformers looks for them
    stem + end for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX)
)


def weight_files(directory: Path) -> list[Path]:
    """Return the files that transformers reads the weights of a directory from; the first can be their index.

    Raises:
        UserError: There are none.
    """
    file = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if file is None:
        raise UserError(
            f"{directory} contains no weights; expected one of {', '.join(WEIGHT_FILES)}"
        )
    if not file.name.endswith(INDEX):
        return [file]
    shards = read_json(file)["weight_map"].values()
    return [file, *(directory / name for name in sorted(set(shards)))]


def tensor_files(directory: Path) -> dict[str, Path]:
    """Return the weight file of each tensor of a directory.

    Raises:
        UserError: The directory has no weights, a weight file is damaged or absent, or one has a tensor that is in
            another one by the index; transformers would keep the last copy.
    """
    from transformers.modeling_utils import load_state_dict

    index, *shards = weight_files(directory)
    files = {}
    if shards:
        files = {name: directory / file for name, file in read_json(index)["weight_map"].items()}
    for shard in shards or [index]:
        with error_context(shard):
            names = [*load_state_dict(shard, map_location="meta")]
        for name in names:
            if files.setdefault(name, shard) != shard:
                raise UserError(
                    f"{shard} has {name}, which {index.name} names in {files[name].name}: one of the two is stale. "
                    "Remove it, e.g. download the checkpoint into an empty folder"
                )
    return files


def read_tensors(directory: Path, part: str) -> dict[str, Tensor]:
    """Return the tensors of a directory's safetensors whose names contain `part`; the others are not read.

    Raises:
        UserError: As :func:`tensor_files`.
    """
    matches = {}
    for name, file in tensor_files(directory).items():
        if part in name:
            with error_context(file), safe_open(file, "pt") as tensors:
                matches[name] = tensors.get_tensor(name)
    return matches


def max_positions(config: "PreTrainedConfig") -> int:
    """Return the positions of an LLM, of image and text together; `sys.maxsize` if its config states no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)


def greedy_config(
    settings: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase"
) -> "GenerationConfig":
    """Return settings of greedy decoding: of a checkpoint's own settings, the token ids only.

    The token that ends the answers in training also ends generation. Penalties, forced and suppressed tokens, minimum
    lengths and the like are dropped.

    Args:
        settings: Generation settings of the checkpoint, or of its LLM.
        tokenizer: Tokenizer of the checkpoint.
    """
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    if pad is None:
        pad = settings.pad_token_id
    ends: Any = end_tokens(settings, tokenizer) or None
    if ends is not None and len(ends) == 1:
        (ends,) = ends
    return GenerationConfig(bos_token_id=settings.bos_token_id, pad_token_id=pad, eos_token_id=ends)


class FiniteLogits:
    """Logits processor of `generate` that raises on NaN and infinite logits, and changes none.

    Of such logits the first token would be the largest, which ends an answer or fills it.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits f32[B, V] of the next tokens; raise a UserError unless the largest ones are finite."""
        # tokens that a checkpoint's settings suppress have -inf
        check_outputs("logits", {"the output head": scores.amax(-1)})
        return scores


def end_tokens(settings: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids of the tokens that end an answer, sorted."""
    ids = settings.eos_token_id
    if not isinstance(ids, list):
        ids = [ids]
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
