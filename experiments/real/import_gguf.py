"""Convert a GGUF file to a Hugging Face directory: `python -m experiments.real.import_gguf FILE OUT`."""

import argparse
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.utils import is_gguf_available
from transformers.utils.quantization_config import GgufConfig

from llava_bidir.common.atomic_io import atomic_directory
from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.hf_loading import load_weights, read_pretrained

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"
# Metadata that changes what a model computes and that transformers' reader leaves out, or reads for some architectures
SENSITIVE = re.compile(r"rope\.|softcap|(logit|residual|embedding|attention)[._]scale$")
SCALING = "rope.scaling."
YARN = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
PRE = "tokenizer.ggml.pre"
# Names of GPT-2's splits of a text, which transformers' reader takes for any name that it does not know; SmolLM's has
# each digit apart. Source: llama.cpp, src/llama-vocab.cpp.
OF_GPT2 = ("gpt-2", "phi-2", "smollm")


def import_gguf(file: Path, out: Path) -> None:
    """Write the language model in a GGUF file to `out` as an ordinary Hugging Face directory, in float32.

    Args:
        file: GGUF file of an architecture that transformers reads, quantised or not.
        out: Directory to write; it must not exist, or be empty.

    Raises:
        UserError: The file is not GGUF, damaged, of another architecture, or has rotary positions, scales, caps or
            splits of texts that cannot be kept, `out` contains files, or the package gguf is not installed.
    """
    if not is_gguf_available():
        raise UserError(
            "import-gguf needs the package gguf; install it with `pip install 'llava-bidir[gguf]'`"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already and is not replaced; move it or choose another path")
    reader = _open(file)
    count = sum(int(tensor.n_elements) for tensor in reader.tensors)
    source = {"path": str(file.parent), "gguf_file": file.name}
    tokenizer = read_pretrained(str(file), AutoTokenizer, **source)
    _set_split(tokenizer, reader, file)
    # "float32" holds the values of every type of GGUF as they are
    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    read = load_weights(str(file), AutoModelForCausalLM, **source, **options)
    _apply_metadata(read.config, _read_sensitive(reader), file)
    model = _without_quantization(read)
    _check_all_used(file, model, count)
    with atomic_directory(out, marker="config.json") as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _open(file: Path) -> "GGUFReader":
    """Return a reader of a GGUF file's metadata and tensors; parsing a large vocabulary takes seconds.

    Raises:
        UserError: It is not a GGUF file, or it is damaged.
    """
    from gguf import GGUFReader  # an optional dependency

    with error_context(f"{file} cannot be read"):
        with file.open("rb") as stream:
            start = stream.read(len(MAGIC))
    if start != MAGIC:
        raise UserError(f"{file} is not a GGUF file: it begins with {start!r}, expected {MAGIC!r}")
    with error_context(f"{file} is damaged; download it again"):
        return GGUFReader(file)


def _set_split(tokenizer: PreTrainedTokenizerBase, reader: "GGUFReader", file: Path) -> None:
    """Let a byte-level tokenizer split texts as its GGUF file says.

    Raises:
        UserError: The file does not say it, or names a split that is not known.
    """
    kind, name = (
        reader.fields[key].contents() if key in reader.fields else None
        for key in ("tokenizer.ggml.model", PRE)
    )
    if kind != "gpt2" or name in GGUF_PRE_TOKENIZER_SPLITS:
        return
    if name not in OF_GPT2:
        raise UserError(
            f"{file} has {PRE} {name!r}, so that texts would have other ids than in the model's training; expected one "
            f"of {', '.join(sorted([*GGUF_PRE_TOKENIZER_SPLITS, *OF_GPT2]))}. Use transformers' format"
        )
    if name == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )


def _apply_metadata(config: PreTrainedConfig, values: dict[str, Any], file: Path) -> None:
    """Set rotary positions, scales and soft caps of a config to those in the metadata of a GGUF file.

    Args:
        config: Config by transformers' reader.
        values: Of :func:`_read_sensitive`; those that the config holds are removed.
        file: For errors.

    Raises:
        UserError: The config has no place for one of them.
    """
    for key in [key for key in values if "rope." not in key and hasattr(config, key)]:
        setattr(config, key, float(values.pop(key)))
    if parameters := getattr(config, "rope_parameters", None):
        _apply_rope(values, config, parameters)
    if values:
        found = ", ".join(f"{key} = {value}" for key, value in sorted(values.items()))
        raise UserError(
            f"{file} has {found} in its metadata, which transformers' {config.model_type} would compute without; "
            "import a checkpoint in transformers' format instead"
        )


def _read_sensitive(reader: "GGUFReader") -> dict[str, Any]:
    """Return the sensitive values in the metadata of a GGUF file, by keys without the architecture."""
    fields = reader.fields
    prefix = fields["general.architecture"].contents() + "."
    return {
        key.removeprefix(prefix): field.contents()
        for key, field in fields.items()
        if key.startswith(prefix) and SENSITIVE.search(key)
    }


def _apply_rope(values: dict[str, Any], config: PreTrainedConfig, parameters: dict) -> None:
    """Set the rotary parameters of a config to those of a GGUF file, and remove from `values` what they hold.

    As in llama.cpp, a factor without a type is linear, and layers with a sliding window have no scaling.
    """
    main = parameters.get("full_attention", parameters)
    bases = {"rope.freq_base": main, "rope.freq_base_swa": parameters.get("sliding_attention")}
    for key, part in bases.items():
        if key in values and part is not None:
            part["rope_theta"] = float(values.pop(key))
    # where kinds of layers differ, transformers knows their sizes by the model type
    if main is not parameters or values.get("rope.dimension_count") == _rotary_size(config, main):
        values.pop("rope.dimension_count", None)
        if main is not parameters:
            values.pop("rope.dimension_count_swa", None)
    values.pop(SCALING + "finetuned", None)  # tells of the training only
    kind = values.get(SCALING + "type", "linear")
    factor = float(values.get(SCALING + "factor", 0)) or 1.0
    if kind not in ("none", "linear", "yarn"):
        return
    used = {
        name: values.pop(SCALING + key) for key, name in YARN.items() if SCALING + key in values
    }
    for key in ("type", "factor"):
        values.pop(SCALING + key, None)
    if kind != "none" and factor != 1:
        main |= {"rope_type": kind, "factor": factor}
        main |= used if kind == "yarn" else {}


def _rotary_size(config: PreTrainedConfig, parameters: dict) -> int:
    """Return the number of dimensions of a head that are rotated."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    return getattr(config, "rotary_dim", None) or int(size * (share or 1.0))


def _without_quantization(read: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its note of having been quantised, with which transformers refuses to save it."""
    config = type(read.config)(
        **{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model


def _check_all_used(file: Path, model: PreTrainedModel, count: int) -> None:
    """Warn if a model has fewer weights than its file: transformers skips tensors that it does not know."""
    used = sum(
        {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values()
    )
    if used < count:
        warnings.warn(
            f"{file}: transformers reads {used:,} of {count:,} weights. It leaves out tensors that it does not know, "
            "such as rotary frequencies scaled for long contexts; compare answers before you rely on the model",
            stacklevel=2,
        )


def main(words: list[str] | None = None) -> None:
    """Import FILE to OUT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    import_gguf(**vars(parser.parse_args(words)))


if __name__ == "__main__":
    main()
