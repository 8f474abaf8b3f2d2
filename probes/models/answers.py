"""Answers of a frozen MLLM, also under a knockout: greedy generation, and log-probabilities of given answers.

Eq. 1 cuts attention among image tokens only. Text tokens therefore attend to all image tokens, blocked ones included,
whose keys and values were computed under the cut. Generated tokens are text, so that no decoding step has pairs to cut:
it reads the keys and values of the first forward from the cache, and the knockout holds in it. A knockout whose rows
are the answer is the exception: it cuts each step.

Given answers to a question share its forward. They are a tree of tokens in one row, after the image. Each token attends
to the prefix, the image, the question and its own answer so far, and has the position that it would have alone::

    positions after the image   0 1 2 | 3 | 3 4
    tokens                      question, a, b      two answers

Positions of prefix, image and the first token of the text are those of the model's own forward, in all dimensions that
it has (time, rows and columns in Qwen and GLM). The other tokens of the text are counted from the first one. Linear
attention and convolutions have no mask: there each answer has a forward of its own.

Shapes: B images, T image tokens, N tokens of prefix and image, A answers, Q tokens of text, d width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import check_outputs, end_tokens, max_positions

from .attention_masks import Masks, decode_under, last_row, mask_values, supports_masks
from .attention_weights import capture_attention, weights_of_image
from .encoder_cut import cut_encoder
from .families.our_code import SLIDING, layer_kinds
from .hooks import with_arguments
from .knockout import ANSWER, TEXT_SETS, Knockout
from .reading import Hooks, replaced_states
from .sites import FINAL_NORM, layer_site


class TokenTree(NamedTuple):
    """Tokens after the image that branch, and the tokens to score."""

    ids: Tensor  # long[Q]
    positions: Tensor  # long[Q], position after the image
    visible: Tensor  # bool[Q, Q], the text tokens that each one attends to
    targets: list[tuple[int, int, int]]  # (token that predicts, id, index of the answer)
    sets: dict[str, Tensor]  # bool[Q] by name of a set of a knockout

    @classmethod
    def from_ids(cls, question: list[int], answers: Sequence[list[int]] = ()) -> "TokenTree":
        """Build the tree of all answers to a question. Last tokens of answers are predicted, but not run."""
        ids = []
        positions = []
        ancestors = []
        targets = []
        set_of_token = []

        def grow(token: int, path: list[int], name: str) -> list[int]:
            ids.append(token)
            set_of_token.append(name)
            positions.append(len(path))
            ancestors.append([*path, len(ids) - 1])
            return ancestors[-1]

        path = []
        for token in question[:-1]:
            path = grow(token, path, "question")
        path = grow(question[-1], path, "last")
        for number, answer in enumerate(answers):
            branch = path
            for i, token in enumerate(answer):
                targets.append((branch[-1], token, number))
                if i + 1 < len(answer):
                    branch = grow(token, branch, ANSWER)
        visible = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        for i, path in enumerate(ancestors):
            visible[i, path] = True
        sets = {}
        for name in TEXT_SETS:
            sets[name] = torch.tensor([other == name for other in set_of_token])
        return cls(torch.tensor(ids), torch.tensor(positions), visible, targets, sets)


# ------------------------------------------------------------------------------------------------- answers
@torch.no_grad()
def score_answers(
    mllm: nn.Module,
    pixels: Tensor,
    question: str,
    answers: Sequence[str],
    knockout: Knockout | None,
    hooks: Hooks | None,
) -> Tensor:
    """Return the log-probabilities of answers; see :meth:`FrozenMLLM.answer_log_probs`."""
    if not answers or not all(text.strip() for text in [question, *answers]):
        raise UserError("got no question or answer, or an empty one; expected a text and a list")
    shares = [answers]
    if mllm.attention_masks(1, knockout) is None:
        shares = [[answer] for answer in answers]
    scores = []
    for share in shares:
        text = TokenTree.from_ids(mllm.chat.question_ids(question), mllm.chat.answer_ids(share))
        states, _ = text_states(mllm, pixels=pixels, text=text, knockout=knockout, hooks=hooks)
        scores.append(_score_text(mllm, states=states, text=text, answers=len(share)))
    return torch.cat(scores, 1)


def _score_text(mllm: nn.Module, states: Tensor, text: TokenTree, answers: int) -> Tensor:
    """Return the log-probabilities f[B, answers] of a text's answers from its normed states f[B, Q, d]."""
    predictors, ids, numbers = (torch.tensor(column) for column in zip(*text.targets, strict=True))
    used, row = predictors.unique(return_inverse=True)
    logits = mllm.word_head(FINAL_NORM)(states[:, used.to(mllm.device)])
    log_probs = logits.float().log_softmax(-1).cpu()[:, row, ids]
    return torch.zeros(len(states), answers).index_add_(1, numbers, log_probs)


@torch.no_grad()
def attend_from_answer(
    mllm: nn.Module,
    pixels: Tensor,
    question: str,
    answer: str,
    sites: Sequence[str],
    knockout: Knockout | None,
    hooks: Hooks | None,
    average_heads: bool,
) -> dict[str, Tensor]:
    """Return attention weights of an answer's tokens by layer; see :meth:`FrozenMLLM.answer_attention`."""
    if not (question.strip() and answer.strip()):
        raise UserError("the question or the answer is empty; expected texts")
    text = TokenTree.from_ids(mllm.chat.question_ids(question), mllm.chat.answer_ids([answer]))
    weights: dict[str, list[Tensor]] = {}
    queries = mllm.ids.shape[1] + torch.tensor([predictor for predictor, _, _ in text.targets])
    image = mllm.is_image.cpu().nonzero().flatten()

    def record(layer: int, compute: Callable[[int, Tensor], Tensor]) -> None:
        site = layer_site(layer)
        if site not in sites:
            return
        weights[site] = [
            weights_of_image(compute(row, queries), image, average_heads)
            for row in range(len(pixels))
        ]

    with capture_attention(mllm.layers, record):
        text_states(mllm, pixels=pixels, text=text, knockout=knockout, hooks=hooks)
    return {site: torch.stack(weights[site]) for site in sites}


@torch.no_grad()
def generate_answer(
    mllm: nn.Module,
    pixels: Tensor,
    question: str,
    knockout: Knockout | None,
    max_new_tokens: int,
    on_token: Callable[[str], None] | None = None,
    hooks: Hooks | None = None,
) -> str:
    """Return the greedy answer to a question about one image f[1, 3, H, W]; see :meth:`FrozenMLLM.answer`."""
    cache = _empty_cache(mllm.text_config)
    answer: list[int] = []
    ids = mllm.chat.question_ids(question)
    ends = end_tokens(mllm.model.generation_config, mllm.chat.tokenizer)
    room = max_positions(mllm.text_config) - mllm.ids.shape[1] - len(ids)
    effect = None
    if knockout and ANSWER in knockout.names("rows"):
        effect = torch.zeros(1, dtype=torch.bool, device=mllm.device)
    text = TokenTree.from_ids(ids)
    states, first_position = text_states(
        mllm, pixels=pixels, text=text, knockout=knockout, hooks=hooks, cache=cache, effect=effect
    )
    word_head = mllm.word_head(FINAL_NORM)
    for _ in range(min(max_new_tokens, room)):
        token = int(word_head(states[:, -1]).argmax())
        if token in ends:
            break
        answer.append(token)
        if on_token:
            on_token(mllm.chat.decode(answer))
        cut = nullcontext()
        if effect is not None:  # rows of the knockout are tokens of the answer
            cut = _cut_step(mllm, question=ids, answer=answer, knockout=knockout, effect=effect)
        with cut:
            position = first_position + len(ids) + len(answer) - 1
            states = _token_states(mllm, token=token, position=position, cache=cache)
        if effect is not None and len(answer) == 1:  # later steps see no more of the prompt
            is_cut = knockout.select_layers(mllm.layers).any(1)
            knockout.check_effect(effect, is_cut.to(effect.device))
    return mllm.chat.decode(answer)


def _empty_cache(text_config: PreTrainedConfig) -> DynamicCache:
    """Return a cache of all tokens, as masks have them; with a config it drops keys outside of sliding windows."""
    if supports_masks(text_config):
        return DynamicCache()
    return DynamicCache(config=text_config)


def _token_states(mllm: nn.Module, token: int, position: Tensor, cache: DynamicCache) -> Tensor:
    """Return the normed states f[1, 1, d] of a token of an answer, after those in the cache."""
    # not the decoder's: some models embed the image's placeholder, if it is generated, in their own way
    output = mllm.model.model(
        input_ids=torch.tensor([[token]], device=mllm.device),
        position_ids=position,
        use_cache=True,
        **mllm.cached(cache),
    )
    return output.last_hidden_state


def _cut_step(
    mllm: nn.Module, question: list[int], answer: list[int], knockout: Knockout, effect: Tensor
) -> ExitStack:
    """Cut the attention of the last token of an answer, of which there is one row, until the stack is closed."""
    # the last token of an answer in a tree does not run, so one more is appended
    text = TokenTree.from_ids(question, [[*answer, 0]])
    masks = last_row(_text_masks(mllm, batch=1, text=text, knockout=knockout))
    with ExitStack() as stack:
        stack.enter_context(
            _cut_text(mllm, text=text, knockout=knockout, masks=masks, effect=effect)
        )
        stack.enter_context(decode_under(mllm.decoder, masks))
        return stack.pop_all()


# ---------------------------------------------------------------------------------------- text after the image
def text_states(
    mllm: nn.Module,
    pixels: Tensor,
    text: TokenTree,
    knockout: Knockout | None = None,
    hooks: Hooks | None = None,
    cache: DynamicCache | None = None,
    effect: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the normed states f[B, Q, d] of text after the image, and the position of its first token, long[..., 1].

    Args:
        mllm: The :class:`FrozenMLLM`.
        pixels: f[B, 3, H, W].
        text: Text after each image.
        knockout: Attention knockout.
        hooks: Functions by site that replace the states of image tokens.
        cache: Empty cache to fill, for decoding.
        effect: As of :meth:`Knockout.apply`.

    Raises:
        UserError: The attention backend is not supported, the text is too long, the intervention is invalid, or states
            are NaN or infinite.
    """
    batch = len(pixels)
    tokens = mllm.ids.shape[1]
    mllm.check_pixels(pixels)
    _check_text(mllm, text)
    masks = _text_masks(mllm, batch=batch, text=text, knockout=knockout)
    ids = torch.cat([mllm.ids[0], text.ids.to(mllm.device)]).expand(batch, -1)
    is_image = _is_image(mllm, text).expand(batch, -1)
    inputs = mllm.family.inputs(mllm.model, pixels.to(mllm.device, mllm.model.dtype), is_image)
    first_positions: list[Tensor] = []

    def of_tree(arguments: dict) -> dict:
        positions = _positions(arguments)
        first = positions[..., tokens : tokens + 1]
        first_positions.append(first)
        of_text = first + text.positions.to(first.device)
        changed = {"position_ids": torch.cat([positions[..., :tokens], of_text], -1)}
        if masks is not None:
            changed |= {"attention_mask": masks}
        return changed

    with ExitStack() as stack:
        if knockout := stack.enter_context(cut_encoder(mllm, knockout, batch)):
            stack.enter_context(
                _cut_text(mllm, text=text, knockout=knockout, masks=masks, effect=effect)
            )
        stack.enter_context(replaced_states(mllm, hooks or {}))
        stack.enter_context(with_arguments(mllm.decoder, of_tree))
        output = mllm.model.model(
            input_ids=ids, use_cache=cache is not None, **mllm.cached(cache), **inputs
        )
    states = output.last_hidden_state[:, tokens:]
    check_outputs("states", {FINAL_NORM: states})
    return states, first_positions[-1]


def _check_text(mllm: nn.Module, text: TokenTree) -> None:
    """Raise a UserError if a text is too long, or contains an image."""
    config = mllm.model.config
    positions = max_positions(config)
    needed = mllm.ids.shape[1] + int(text.positions.max()) + 1
    if needed > positions:
        raise UserError(
            f"image and text have {needed} tokens, but the LLM has {positions} positions; shorten the text"
        )
    if config.image_token_id in text.ids:
        raise UserError(
            "a question or an answer contains the image's placeholder; remove it from the text"
        )


def _text_masks(
    mllm: nn.Module, batch: int, text: TokenTree, knockout: Knockout | None
) -> Masks | None:
    """Return the masks of prefix, image and text, [B, 1, N + Q, N + Q]; None if the model has its own only.

    Raises:
        UserError: There is a knockout, and a layer has no mask.
    """
    masks = mllm.attention_masks(batch, knockout)
    if masks is None:
        return None
    tokens = mllm.ids.shape[1]
    # image tokens of PaliGemma attend to the question under its own mask
    if mllm.family.question_in_prefix and mllm.image_attention == "prefix":
        question = int((~text.sets[ANSWER]).sum())
        block = torch.ones(batch, tokens + question, dtype=torch.bool, device=mllm.device)
        masks = mllm.build_masks(block)

    def with_text(kind: str, mask: Tensor) -> Tensor:
        window = None
        if kind == SLIDING:
            window = mllm.text_config.sliding_window
        return _append_text(mask, tokens=tokens, text=text, window=window)

    if isinstance(masks, dict):
        return {kind: with_text(kind, mask) for kind, mask in masks.items()}
    return with_text(layer_kinds(mllm.text_config)[0], masks)


def _positions(arguments: dict) -> Tensor:
    """Return the position ids of a decoder's arguments; without any, it counts its tokens."""
    positions = arguments.get("position_ids")
    if positions is None:
        states = arguments["inputs_embeds"]
        positions = torch.arange(states.shape[1], device=states.device)[None]
    return positions


def _is_image(mllm: nn.Module, text: TokenTree) -> Tensor:
    """Return which tokens of prefix, image and text are image tokens, bool[N + Q]."""
    return torch.cat([mllm.is_image, torch.zeros_like(text.ids, dtype=torch.bool).to(mllm.device)])


def _cut_text(
    mllm: nn.Module, text: TokenTree, knockout: Knockout, masks: Masks, effect: Tensor | None
) -> AbstractContextManager[None]:
    """Cut the attention of prefix, image and text while the context is open; see :meth:`Knockout.apply`."""
    before = torch.zeros(mllm.ids.shape[1], dtype=torch.bool)
    sets = {}
    for name, tokens in text.sets.items():
        sets[name] = torch.cat([before, tokens]).to(mllm.device)
    return knockout.apply(
        mllm.layers,
        masks=masks,
        is_image=_is_image(mllm, text),
        depth=len(mllm.layers),
        text=sets,
        effect=effect,
    )


def _append_text(mask: Tensor, tokens: int, text: TokenTree, window: int | None) -> Tensor:
    """Return a mask with rows and columns for the text, [B, 1, N + Q, N + Q].

    Args:
        mask: [B, 1, M, M] of prefix, image and the M - N tokens of a question that image tokens attend to, if any.
        tokens: N.
        text: Text after the image.
        window: Number of tokens that a layer with a sliding window attends to.
    """
    first = mask.shape[-1]
    length = len(text.ids)
    seen = torch.cat([torch.ones(length, tokens, dtype=torch.bool), text.visible], 1)
    if window:
        keys = torch.cat([torch.arange(tokens), tokens + text.positions])
        seen &= tokens + text.positions[:, None] - keys < window
    allowed, forbidden = mask_values(mask.dtype)
    extended = mask.new_full((len(mask), 1, tokens + length, tokens + length), forbidden)
    extended[:, :, tokens:].masked_fill_(seen.to(mask.device), allowed)
    extended[:, :, :first, :first] = mask
    return extended
