"""Answers of a frozen MLLM, also under a knockout: greedy generation, and log-probabilities of given answers.

Eq. 1 cuts attention among image tokens only. Text tokens therefore attend to all image tokens, blocked ones included,
whose keys and values were computed under the cut. Generated tokens are text, so that no decoding step has pairs to cut:
it reads the keys and values of the first forward from the cache, and the knockout holds in it. A knockout whose rows
are the answer is the exception: it cuts each step.

Questions and answers about an image share its forward. They are a tree of tokens in one row, after the image. Each
token attends to the prefix, the image, its own question and its own answer so far, and has the position that it would
have alone. Two questions with two answers each::

    positions after the image   0 1 2 | 3 | 3 4 | 0 1 | 2 | 2 3
    tokens                      question A, a, b; question B, a, b

Shapes: B images, T image tokens, N tokens of prefix and image, P questions, A answers, Q tokens of text, d width.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from llava_bidir.common.arguments import check_is_list, check_is_text
from llava_bidir.common.errors import UserError
from llava_bidir.common.greedy import end_tokens
from llava_bidir.common.model_outputs import check_outputs

from .attention_masks import Masks, decode_under, last_rows
from .attention_weights import capture_attention
from .families import SLIDING, Family
from .knockout import ANSWER, TEXT_SETS, Knockout
from .sites import FINAL_NORM


class TextTree(NamedTuple):
    """Tokens after the image that branch, and the tokens to score."""

    ids: Tensor  # long[Q]
    positions: Tensor  # long[Q], position after the image
    visible: Tensor  # bool[Q, Q], the text tokens that each one attends to
    targets: list[tuple[int, int, int]]  # (token that predicts, id, index of the answer p * A + a)
    sets: dict[str, Tensor]  # bool[Q] by name of a set of a knockout

    @classmethod
    def from_ids(
        cls,
        questions: Sequence[list[int]],
        answers: Sequence[list[int]] = (),
        options: Sequence[list[bool]] = (),
    ) -> "TextTree":
        """Build the tree of all answers to all questions. Last tokens of answers are predicted, but not run.

        `options` says of each question's tokens whether they are options, () that none is.
        """
        ids = []
        positions = []
        ancestors = []
        targets = []
        sets = []  # of each token

        def grow(token: int, path: list[int], name: str) -> list[int]:
            ids.append(token)
            sets.append(name)
            positions.append(len(path))
            ancestors.append([*path, len(ids) - 1])
            return ancestors[-1]

        for row, question in enumerate(questions):
            path = []
            is_option = options[row] if options else [False] * len(question)
            for token, name in zip(question, question_sets(is_option), strict=True):
                path = grow(token, path, name)
            for number, answer in enumerate(answers, row * len(answers)):
                branch = path
                for i, token in enumerate(answer):
                    targets.append((branch[-1], token, number))
                    if i + 1 < len(answer):
                        branch = grow(token, branch, ANSWER)
        visible = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        for i, path in enumerate(ancestors):
            visible[i, path] = True
        of_sets = {name: torch.tensor([own == name for own in sets]) for name in TEXT_SETS}
        return cls(
            torch.tensor(ids),
            torch.tensor(positions),
            visible,
            targets,
            of_sets,
        )


def question_sets(is_option: Sequence[bool]) -> list[str]:
    """Return the set of each token of a question: "question", "options" or, of the last one, "last"."""
    names = ["options" if flag else "question" for flag in is_option]
    return [*names[:-1], "last"]


def check_family(family: Family, kind: str) -> None:
    """Raise a UserError unless the family's chat template states all text after the image."""
    if not family.answers:
        raise UserError(
            f"answers of {kind} are not supported: its processor adds tiles or tokens after the image that the chat "
            "template does not state, or its position ids do not count tokens; use the family's own generate()"
        )


def text_states(
    mllm: nn.Module,
    pixels: Tensor,
    text: TextTree,
    knockout: Knockout | None,
    cache: DynamicCache | None = None,
) -> Tensor:
    """Return the normed states f[B, Q, d] of text after the image, from one forward.

    Args:
        mllm: The :class:`FrozenMLLM`.
        pixels: f[B, 3, H, W].
        text: Text after each image.
        knockout: Attention knockout.
        cache: Empty cache to fill, for decoding.

    Raises:
        UserError: The family or the attention backend is not supported, the text is too long, the knockout is invalid,
            or states are NaN or infinite.
    """
    config = mllm.model.config.get_text_config()
    batch = len(pixels)
    tokens = mllm.ids.shape[1]
    check_family(mllm.family, mllm.model.config.model_type)
    mllm.check_pixels(pixels)
    if tokens + int(text.positions.max()) >= config.max_position_embeddings:
        raise UserError(
            f"image and text have {tokens + int(text.positions.max()) + 1} tokens, but the LLM has "
            f"{config.max_position_embeddings} positions; shorten the text"
        )
    if mllm.model.config.image_token_id in text.ids:
        raise UserError(
            "a question or an answer contains the image's placeholder; remove it from the text"
        )
    masks = append_text(
        mllm.attention_masks(batch, knockout), text, getattr(config, "sliding_window", None)
    )
    ids = torch.cat([mllm.ids[0], text.ids.to(mllm.device)]).expand(batch, -1)
    positions = torch.cat([torch.arange(tokens), tokens + text.positions])
    positions = positions.to(mllm.device).expand(batch, -1)
    is_image = torch.cat(
        [mllm.is_image, torch.zeros(len(text.ids), dtype=torch.bool, device=mllm.device)]
    )
    inputs = mllm.family.inputs(
        mllm.model, pixels.to(mllm.device, mllm.model.dtype), is_image.expand(batch, -1)
    )
    with ExitStack() as hooks:
        if knockout:
            layers = mllm.decoder.layers
            sets = sets_after_image(mllm, text)
            answer_follows = cache is not None
            hooks.enter_context(
                knockout.apply(
                    layers,
                    masks,
                    is_image,
                    len(layers),
                    sets,
                    answer_follows,
                )
            )
        hooks.enter_context(decode_under(mllm.decoder, masks))
        output = mllm.model.model(
            input_ids=ids,
            position_ids=positions,
            use_cache=cache is not None,
            **mllm.cached(cache),
            **inputs,
        )
    states = output.last_hidden_state[:, tokens:]
    check_outputs("states", {FINAL_NORM: states})
    return states


def sets_after_image(mllm: nn.Module, text: TextTree) -> dict[str, Tensor]:
    """Return the tokens of each set of the text after the image, bool[N + Q] by name."""
    before = torch.zeros(mllm.ids.shape[1], dtype=torch.bool)
    sets = {}
    for name, tokens in text.sets.items():
        sets[name] = torch.cat([before, tokens]).to(mllm.device)
    return sets


def append_text(masks: Masks, text: TextTree, window: int | None) -> Masks:
    """Return the masks of prefix and image with rows and columns for the text, [B, 1, N + Q, N + Q]."""
    if isinstance(masks, dict):
        return {
            k: append_text(mask, text, window if k == SLIDING else None)
            for k, mask in masks.items()
        }
    tokens = masks.shape[-1]
    length = len(text.ids)
    seen = torch.cat([torch.ones(length, tokens, dtype=torch.bool), text.visible], 1)
    if window:
        keys = torch.cat([torch.arange(tokens), tokens + text.positions])
        seen &= tokens + text.positions[:, None] - keys < window
    seen = seen.to(masks.device)
    forbidden = False if masks.dtype == torch.bool else torch.finfo(masks.dtype).min
    extended = masks.new_full((len(masks), 1, tokens + length, tokens + length), forbidden)
    extended[:, :, :tokens, :tokens] = masks
    extended[:, :, tokens:] = masks.new_full(seen.shape, forbidden).masked_fill(
        seen, True if masks.dtype == torch.bool else 0.0
    )
    return extended


@torch.no_grad()
def score_answers(
    mllm: nn.Module,
    pixels: Tensor,
    questions: Sequence[str],
    answers: Sequence[str],
    knockout: Knockout | None,
) -> Tensor:
    """Return the log-probabilities of answers; see :meth:`FrozenMLLM.answer_log_probs`."""
    check_is_list("questions", questions, "['What is it?']")
    check_is_list("answers", answers, "['cat', 'dog']")
    for text in [*questions, *answers]:
        check_is_text("each question and answer", text)
    if not questions or not answers or not all(text.strip() for text in [*questions, *answers]):
        raise UserError("got no question or answer, or an empty one; expected lists of texts")
    text = TextTree.from_ids(
        [*map(mllm.chat.question_ids, questions)],
        mllm.chat.answer_ids(answers),
        option_tokens(mllm, questions, knockout),
    )
    predictors, ids, numbers = (torch.tensor(column) for column in zip(*text.targets, strict=True))
    used, row = predictors.unique(return_inverse=True)
    states = text_states(mllm, pixels, text, knockout)[:, used.to(mllm.device)]
    log_probs = mllm.logit_lens(states, FINAL_NORM).float().log_softmax(-1).cpu()[:, row, ids]
    scores = torch.zeros(len(pixels), len(questions) * len(answers)).index_add_(
        1, numbers, log_probs
    )
    return scores.view(len(pixels), len(questions), len(answers))


@torch.no_grad()
def attend_from_answer(
    mllm: nn.Module,
    pixels: Tensor,
    question: str,
    answer: str,
    layers: Sequence[int],
    knockout: Knockout | None,
) -> Tensor:
    """Return attention weights of an answer's tokens f[L, A, n, T]; see :meth:`FrozenMLLM.answer_attention`."""
    check_is_text("question", question)
    check_is_text("answer", answer)
    if not (question.strip() and answer.strip()):
        raise UserError("the question or the answer is empty; expected texts")
    if len(pixels) != 1:
        raise UserError(f"got pixels of {len(pixels)} images; expected one image")
    text = TextTree.from_ids(
        [mllm.chat.question_ids(question)],
        mllm.chat.answer_ids([answer]),
        option_tokens(mllm, [question], knockout),
    )
    weights = {}
    queries = mllm.ids.shape[1] + torch.tensor([predictor for predictor, _, _ in text.targets])
    image = mllm.is_image.cpu().nonzero().flatten()

    def record(layer: int, compute: Callable[[int, Tensor], Tensor]) -> None:
        if layer in layers:
            weights[layer] = compute(0, queries).cpu()[..., image]

    with capture_attention(mllm.decoder.layers, record):
        text_states(mllm, pixels, text, knockout)
    return torch.stack([weights[layer] for layer in layers])


@torch.no_grad()
def generate_answer(
    mllm: nn.Module,
    pixels: Tensor,
    question: str,
    knockout: Knockout | None,
    max_new_tokens: int,
    on_token: Callable[[str], None] | None = None,
) -> str:
    """Return the greedy answer to a question about one image f[1, 3, H, W]; see :meth:`FrozenMLLM.answer`."""
    cache = DynamicCache()
    answer = []
    ids = mllm.chat.question_ids(question)
    ends = end_tokens(mllm.model.generation_config, mllm.chat.tokenizer)
    room = (
        mllm.model.config.get_text_config().max_position_embeddings - mllm.ids.shape[1] - len(ids)
    )
    options = option_tokens(mllm, [question], knockout)
    states = text_states(
        mllm,
        pixels,
        TextTree.from_ids([ids], (), options),
        knockout,
        cache,
    )
    for _ in range(min(max_new_tokens, room)):
        token = int(mllm.logit_lens(states[:, -1], FINAL_NORM).argmax())
        if token in ends:
            break
        answer.append(token)
        if on_token:
            on_token(mllm.chat.tokenizer.decode(answer, skip_special_tokens=True).strip())
        states = _decode(mllm, ids, answer, options, knockout, cache)
    return mllm.chat.tokenizer.decode(answer, skip_special_tokens=True).strip()


def option_tokens(
    mllm: nn.Module, questions: Sequence[str], knockout: Knockout | None
) -> list[list[bool]]:
    """Return which tokens of each question are options; [] if the knockout names neither these nor the question.

    Raises:
        UserError: The knockout names options, and a question has none.
    """
    named = set() if knockout is None else {*knockout.names("rows"), *knockout.names("columns")}
    if not named & {"question", "options"}:
        return []
    tokens = [mllm.chat.is_option(question) for question in questions]
    for question, flags in zip(questions, tokens, strict=True):
        if "options" in named and not any(flags):
            raise UserError(
                f"the question has no options, which the knockout names: {question!r}; expected lines such as "
                "'A. a cat'"
            )
    return tokens


def _decode(
    mllm: nn.Module,
    question: list[int],
    answer: list[int],
    options: list[list[bool]],
    knockout: Knockout | None,
    cache: DynamicCache,
) -> Tensor:
    """Return the normed state f[1, 1, d] of the last token of an answer; the cache has all before it."""
    more = {}
    with ExitStack() as hooks:
        if knockout and ANSWER in knockout.names("rows"):
            # the last token of an answer in a tree does not run, so one more is appended
            text = TextTree.from_ids([question], [[*answer, 0]], options)
            window = getattr(mllm.model.config.get_text_config(), "sliding_window", None)
            masks = last_rows(append_text(mllm.attention_masks(1, knockout), text, window), 1)
            after_image = torch.zeros(len(text.ids), dtype=torch.bool, device=mllm.device)
            is_image = torch.cat([mllm.is_image, after_image])
            layers = mllm.decoder.layers
            sets = sets_after_image(mllm, text)
            hooks.enter_context(
                knockout.apply(
                    layers,
                    masks,
                    is_image,
                    len(layers),
                    sets,
                )
            )
            more = {"attention_mask": masks}
        output = mllm.decoder(
            input_ids=torch.tensor([[answer[-1]]], device=mllm.device),
            use_cache=True,
            **mllm.cached(cache),
            **more,
        )
    return output.last_hidden_state
