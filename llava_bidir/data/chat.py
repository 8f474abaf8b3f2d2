r"""Conversations in a language model's own chat template, with the answers that it trains found in the text itself.

The text of a conversation begins with the prompt of each of its answers. Rendering both shows what the template writes
for an answer; with the prompt's text underlined and the supervised one marked by ^::

    <|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n
    ______________________________________________________________^^^^^^^^^^^^^^^

Templates that write something else there, e.g. reasoning before the last answer only, cannot be trained and are errors.
"""

from collections.abc import Callable, Sequence
from os.path import commonprefix

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.tokenizer import start_ids

ROLES = {"human": "user", "gpt": "assistant"}
ADVICE = "use data.template vicuna_v1, or an LLM whose tokenizer has another chat template"


def render_chat(turns: Sequence[dict[str, str]], tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and [start, end) of each answer with its end token.

    A conversation that ends with a question, or with an empty answer, yields the prompt for its answer.

    Args:
        turns: LLaVA's turns, which alternate and begin with a question.
        tokenizer: Tokenizer with the chat template; its eos token ends each answer.

    Raises:
        UserError: There is no chat template, it fails, or the answers cannot be found in its text.
    """
    if not tokenizer.chat_template:
        raise UserError(f"data.template chat: the LLM's tokenizer has no chat template; {ADVICE}")
    messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]

    def render(count: int) -> str:
        is_prompt = count % 2 == 1
        with error_context("chat template of the LLM"):  # runs in jinja's sandbox
            return tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=is_prompt
            )

    text = render(len(messages))
    spans = []
    if start_ids(tokenizer, text):
        raise UserError(
            f"the tokenizer begins texts with a token that its chat template lacks; {ADVICE}"
        )
    for count in range(2, len(messages) + 1, 2):
        prompt = render(count - 1)
        answered = render(count)
        if not text.startswith(answered) or not answered.startswith(prompt):
            raise UserError(
                f"the chat template writes a turn differently if others follow it; {ADVICE}"
            )
        length = _answer_length(
            answered[len(prompt) :], messages[count - 1]["content"], tokenizer.eos_token
        )
        if length:
            spans.append((len(prompt), len(prompt) + length))
    return text, spans


def _answer_length(written: str, answer: str, eos: str) -> int:
    """Return the characters up to the end token in what a template writes for an answer; 0 for an empty answer."""
    for text in (answer, answer.strip()):  # some templates strip it
        if not text:
            return 0
        before, _, after = written.partition(text)
        if not before.strip() and after.lstrip().startswith(eos):
            return len(written) - len(after) + after.index(eos) + len(eos)
    raise UserError(
        f"the chat template writes {written[:200]!r} for the answer {answer[:80]!r}; expected the answer and the end "
        f"token {eos!r}. {ADVICE}"
    )


def supervised_tokens(
    text: str,
    span: tuple[int, int],
    ids: list[int],
    tokenize: Callable[[str], list[int]],
    tokenizer,
) -> slice:
    """Return the tokens of an answer among the ids of a text.

    The prompt's tokens come before them, so that a prompt alone has the ids of training. A token in which white space
    at the start of an answer joins that of the prompt is not supervised.

    Raises:
        UserError: The prompt ends inside a word of the text.
    """
    answer = text[slice(*span)]
    prompt = tokenize(text[: span[0]])
    start = len(commonprefix([prompt, ids]))
    end = len(tokenize(text[: span[1]]))
    if start < len(prompt):

        def decode():
            return tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)

        while start < end and not answer.endswith(decode()):
            start += 1
        if answer.removesuffix(decode()).strip():
            raise UserError(
                f"the prompt of the chat template ends inside a token before {answer[:80]!r}; {ADVICE}"
            )
    return slice(start, end)
