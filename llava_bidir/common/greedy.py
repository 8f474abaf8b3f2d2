"""The generation settings of greedy answers, the same wherever a model is asked.

Checkpoints have settings of their own: a temperature, or a repetition penalty, which changes greedy answers, too.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from .model_outputs import check_outputs

if TYPE_CHECKING:  # seconds, which commands without a model do not need
    from transformers import GenerationConfig, PreTrainedTokenizerBase


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

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits f32[B, V] of the next tokens; raise a UserError unless the largest ones are finite."""
        # tokens that a checkpoint's settings suppress have -inf
        check_outputs("logits", {"the output head": scores.amax(-1)})
        return scores


def end_tokens(own: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids of the tokens that end an answer, sorted."""
    ids = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return sorted({*ids, tokenizer.eos_token_id} - {None})
