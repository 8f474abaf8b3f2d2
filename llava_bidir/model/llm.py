"""The LLM of a model: its weights, its vocabulary, and a comparison of its logits."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.hf import load_weights, read_pretrained

from .modeling_llava_bidir import LlavaBidirForConditionalGeneration

# Source: Hugging Face's conversion of LLaVA-1.5 pads the extended vocabulary to a multiple of it.
VOCABULARY_MULTIPLE = 64

CHECKED_TOKENS = 8  # of a text whose logits are compared with the LLM's
NEAR = 1e-4  # relative difference that orders of operations make in float32


# Names of weights in a llava, by transformers 5 and by earlier versions, and those of its LLM alone
OF_LLAVA = {
    r"^(model\.language_model|language_model\.model)\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


def read_llm_config(path: str) -> PreTrainedConfig:
    """Return the config of an LLM; that of a llava's LLM if `path` is a llava, from which a training goes on.

    Raises:
        UserError: There is no such checkpoint.
    """
    config = read_pretrained("model.llm", AutoConfig, path)
    return config.text_config if isinstance(config, LlavaConfig) else config


def _llm_in_llava(path: str) -> dict[str, Any]:
    """Return what `from_pretrained` needs to read only the LLM of a llava; {} for an LLM."""
    config = read_pretrained("model.llm", AutoConfig, path)
    if not isinstance(config, LlavaConfig):
        return {}
    return {"config": config.text_config, "key_mapping": OF_LLAVA}


def load_llm(
    path: str,
    config: PreTrainedConfig,
    tokens: int,
    *,
    dtype: torch.dtype,
    attn_implementation: str,
):
    """Load the LLM, also that of a llava, in `dtype` and resize its vocabulary to at least `tokens` rows.

    If `dtype` is not torch's default, the embeddings are converted last: the rows of added tokens are the mean of
    embeddings of full precision.
    """
    reader = AutoModelForCausalLM
    default = torch.get_default_dtype()
    if dtype != default:
        with torch.device("meta"):
            model_class = type(AutoModelForCausalLM.from_config(config))

        class LanguageModel(model_class):
            def __init__(self, config: PreTrainedConfig):
                super().__init__(config)
                # from_pretrained keeps dtypes that differ from its own
                for embeddings in _embeddings(self):
                    embeddings.to(default)

        reader = LanguageModel
    of_llava = _llm_in_llava(path)
    with _without_load_report() if of_llava else nullcontext():
        language_model = load_weights(
            "model.llm",
            reader,
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            **of_llava,
        )
    with error_context(f"model.llm: {path}"):
        _check_head(language_model)
        resize_vocabulary(language_model, tokens)
    for embeddings in _embeddings(language_model):
        embeddings.weight.data = embeddings.weight.data.to(dtype)
    return language_model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Leave out transformers' list of tensors that it does not read, here all of the encoder and the adapter."""
    log = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


def _embeddings(language_model: nn.Module) -> list[nn.Module]:
    return [language_model.get_input_embeddings(), language_model.get_output_embeddings()]


def padded_vocab_size(rows: int, tokens: int) -> int:
    """Return `rows` if they hold `tokens`, else `tokens` rounded up to a multiple that suits GPUs.

    Deviates: LLaVA trains with 32,000 rows. Here the softmax of a 7B's loss has the 64 new rows, too.
    """
    return rows if tokens <= rows else math.ceil(tokens / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def resize_vocabulary(language_model, tokens: int) -> None:
    """Resize the embeddings to at least `tokens` rows; each new row is the mean of the old ones.

    Source: smart_tokenizer_and_embedding_resize of LLaVA's train.py. The rows do not depend on the seed, since
    checkpoints lack those of a frozen LLM.
    """
    rows = language_model.get_input_embeddings().num_embeddings
    if padded_vocab_size(rows, tokens) > rows:
        with torch.random.fork_rng(devices=[]):  # transformers draws rows first
            language_model.resize_token_embeddings(
                padded_vocab_size(rows, tokens), mean_resizing=False
            )
        for embeddings in _embeddings(language_model):
            embeddings.weight.data[rows:] = embeddings.weight.data[:rows].mean(0)
        bias = language_model.get_output_embeddings().bias
        if bias is not None:
            bias.data[rows:] = bias.data[:rows].mean()


def _check_head(language_model: PreTrainedModel) -> None:
    """Raise if an LLM does not have a linear head of the embeddings' size."""
    head = language_model.get_output_embeddings()
    rows = language_model.get_input_embeddings().num_embeddings
    if not isinstance(head, nn.Linear) or head.out_features != rows:
        raise UserError(f"expected an LLM with a linear head for {rows} tokens, got {head}")


@torch.no_grad()
def check_text_logits(
    model: LlavaBidirForConditionalGeneration, language_model: PreTrainedModel
) -> None:
    """Raise if the logits of a text differ from those of the LLM that is part of the model.

    LLMs scale their logits, feed ids into several layers, and more: a comparison notices what the model does not do.
    Under ZeRO-3, where no process has all weights, nothing is compared.
    """
    if any(hasattr(parameter, "ds_id") for parameter in language_model.parameters()):
        return
    embeddings = language_model.get_input_embeddings()
    numbers = torch.arange(1, CHECKED_TOKENS + 1, device=embeddings.weight.device)
    ids = numbers[None] * (embeddings.num_embeddings // (CHECKED_TOKENS + 2))
    own = language_model(input_ids=ids, use_cache=False).logits.float()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    difference = (logits - own).abs().max().item()
    largest = own.abs().max().item()
    if not difference <= largest * max(NEAR, 2 * torch.finfo(language_model.dtype).eps):
        kind = language_model.config.model_type
        raise UserError(
            f"the logits of a text differ by {difference:.3g} from those of the LLM itself, whose largest is "
            f"{largest:.3g}: {kind} computes them in a way that is not supported; use another LLM"
        )
