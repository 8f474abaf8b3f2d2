"""Text after the image as a tree of tokens, and its masks and positions in a forward.

Answers to a question about an image share its forward. They are a tree of tokens in one row, after the image. Each
token attends to the prefix, the image, the question and its own answer so far, and has the position that it would have
alone. Two answers::

    positions after the image   0 1 2 | 3 | 3 4
    tokens                      question, a, b

Positions of prefix, image and the first token of the text are those of the model's own forward, in all dimensions that
it has (time, rows and columns in Qwen and GLM). The other tokens of the text are counted from the first one.

Shapes: B images, N tokens of prefix and image, Q tokens of text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention_masks import Masks
from .families.our_code import SLIDING
from .hooks import with_arguments
from .knockout import ANSWER, TEXT_SETS


class TextTree(NamedTuple):
    """Tokens after the image that branch, and the tokens to score."""

    ids: Tensor  # long[Q]
    positions: Tensor  # long[Q], position after the image
    visible: Tensor  # bool[Q, Q], the text tokens that each one attends to
    targets: list[tuple[int, int, int]]  # (token that predicts, id, index of the answer)
    sets: dict[str, Tensor]  # bool[Q] by name of a set of a knockout

    @classmethod
    def from_ids(
        cls,
        question: list[int],
        answers: Sequence[list[int]] = (),
    ) -> "TextTree":
        """Build the tree of all answers to a question. Last tokens of answers are predicted, but not run."""
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
        of_sets = {name: torch.tensor([own == name for own in sets]) for name in TEXT_SETS}
        return cls(
            torch.tensor(ids),
            torch.tensor(positions),
            visible,
            targets,
            of_sets,
        )


def append_text(
    masks: Masks,
    tokens: int,
    text: TextTree,
    window: int | None,
) -> Masks:
    """Return masks with rows and columns for the text, [B, 1, N + Q, N + Q].

    Args:
        masks: [B, 1, M, M] of prefix, image and the M - N tokens of a question that image tokens attend to, if any.
        tokens: N.
        text: Text after the image.
        window: Number of tokens that layers with a sliding window attend to.
    """
    if isinstance(masks, dict):
        return {
            kind: append_text(mask, tokens, text, window if kind == SLIDING else None)
            for kind, mask in masks.items()
        }
    first = masks.shape[-1]
    length = len(text.ids)
    seen = torch.cat([torch.ones(length, tokens, dtype=torch.bool), text.visible], 1)
    if window:
        keys = torch.cat([torch.arange(tokens), tokens + text.positions])
        seen &= tokens + text.positions[:, None] - keys < window
    seen = seen.to(masks.device)
    forbidden = False if masks.dtype == torch.bool else torch.finfo(masks.dtype).min
    extended = masks.new_full((len(masks), 1, tokens + length, tokens + length), forbidden)
    extended[:, :, tokens:] = masks.new_full(seen.shape, forbidden).masked_fill(
        seen, True if masks.dtype == torch.bool else 0.0
    )
    extended[:, :, :first, :first] = masks
    return extended


@contextmanager
def decode_tree(
    decoder: nn.Module,
    masks: Masks | None,
    tokens: int,
    text: TextTree,
) -> Iterator[list[Tensor]]:
    """Give a decoder the masks and positions of a text after N `tokens` while the context is open.

    Without masks, it has its own. Yields a list that receives the position of the text's first token, long[..., 1].
    """
    first_positions = []

    def replace(arguments: dict) -> dict:
        positions = arguments.get("position_ids")
        if positions is None:  # the decoder would count its tokens
            states = arguments["inputs_embeds"]
            positions = torch.arange(states.shape[1], device=states.device)[None]
        first = positions[..., tokens : tokens + 1]
        first_positions.append(first)
        of_text = first + text.positions.to(first.device)
        changed = {"position_ids": torch.cat([positions[..., :tokens], of_text], -1)}
        return changed if masks is None else changed | {"attention_mask": masks}

    with with_arguments(decoder, replace):
        yield first_positions
