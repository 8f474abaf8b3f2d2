"""`llava-bidir import-gguf`: convert a GGUF file to a Hugging Face directory."""

import argparse
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import is_gguf_available
from transformers.utils.quantization_config import GgufConfig

from llava_bidir.common.atomic_io import atomic_directory
from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.hf_loading import load_weights, read_pretrained

MAGIC = b"GGUF"


def import_gguf(file: Path, out: Path) -> None:
    """Write the language model in a GGUF file to `out` as an ordinary Hugging Face directory, in float32.

    Args:
        file: GGUF file of an architecture that transformers reads, quantised or not.
        out: Directory to write; it must not exist, or be empty.

    Raises:
        UserError: The file is not GGUF, damaged, or of another architecture, `out` contains files, or the package gguf
            is not installed.
    """
    if not is_gguf_available():
        raise UserError(
            "import-gguf needs the package gguf; install it with `pip install 'llava-bidir[gguf]'`"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already and is not replaced; move it or choose another path")
    count = _count_weights(file)
    source = {"path": str(file.parent), "gguf_file": file.name}
    tokenizer = read_pretrained(str(file), AutoTokenizer, **source)
    # "float32" holds the values of every type of GGUF as they are
    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    model = _without_quantization(
        load_weights(str(file), AutoModelForCausalLM, **source, **options)
    )
    _check_all_used(file, model, count)
    with atomic_directory(out, marker="config.json") as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _count_weights(file: Path) -> int:
    """Return the number of weights in a GGUF file.

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
        return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)


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


def run(args: argparse.Namespace) -> None:
    """Run `llava-bidir import-gguf`."""
    import_gguf(args.file, args.out)
    print(args.out)
