"""Convert a GGUF file to a Hugging Face directory: `python -m experiments.real.import_gguf FILE OUT`."""

import argparse
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

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
from transformers.utils.quantization_config import GgufConfig

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.files import atomic_directory
from llava_bidir.common.hf import load_weights, read_pretrained

if TYPE_CHECKING:
    from gguf import GGUFReader

# Metadata that changes what a model computes; transformers' reader leaves it out, but for the first two
SENSITIVE = re.compile(r"rope\.|softcap|(logit|residual|embedding|attention)[._]scale$")
READ = ("rope.freq_base", "rope.dimension_count")
PRE = "tokenizer.ggml.pre"
# Names of GPT-2's splits of a text, which transformers' reader takes for any name that it does not know; SmolLM's has
# each digit apart. Source: llama.cpp, src/llama-vocab.cpp.
OF_GPT2 = ("gpt-2", "phi-2", "smollm")


def import_gguf(file: Path, out: Path) -> None:
    """Write the language model in a GGUF file to `out` as an ordinary Hugging Face directory, in float32.

    Args:
        file: GGUF file of an architecture that transformers reads, quantised or not.
        out: Directory to write.

    Raises:
        UserError: The file is damaged, of another architecture, or has rotary positions, scales, caps or splits of
            texts that cannot be kept.
    """
    from gguf import GGUFReader  # an optional dependency

    with error_context(f"{file} cannot be read"):
        reader = GGUFReader(file)
    count = sum(int(tensor.n_elements) for tensor in reader.tensors)
    source = {"path": str(file.parent), "gguf_file": file.name}
    tokenizer = read_pretrained(str(file), AutoTokenizer, **source)
    _set_split(tokenizer, reader, file)
    # "float32" holds the values of every type of GGUF as they are
    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    read = load_weights(str(file), reader=AutoModelForCausalLM, **source, **options)
    _check_metadata(read.config, reader, file)
    model = _without_quantization(read)
    _check_all_used(file, model, count)
    with atomic_directory(out, marker="config.json") as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _set_split(tokenizer: PreTrainedTokenizerBase, reader: "GGUFReader", file: Path) -> None:
    """Let a byte-level tokenizer split texts as its GGUF file says.

    Raises:
        UserError: The file does not say it, or names a split that is not known.
    """
    kind = _read_text(reader, "tokenizer.ggml.model")
    name = _read_text(reader, PRE)
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


def _read_text(reader: "GGUFReader", key: str) -> str | None:
    """Return the value of a key, None if the file has none."""
    if key not in reader.fields:
        return None
    return reader.fields[key].contents()


def _check_metadata(config: PreTrainedConfig, reader: "GGUFReader", file: Path) -> None:
    """Raise a UserError if transformers would compute without rotary parameters, scales or caps of a GGUF file."""
    prefix = reader.fields["general.architecture"].contents() + "."
    lost = [
        f"{key.removeprefix(prefix)} = {field.contents()}"
        for key, field in reader.fields.items()
        if key.startswith(prefix) and SENSITIVE.search(key) and not key.endswith(READ)
    ]
    if lost:
        listed = ", ".join(lost)
        raise UserError(
            f"{file} has {listed} in its metadata, which transformers' {config.model_type} would compute without; "
            "import a checkpoint in transformers' format instead"
        )


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
