"""The most probable classes and words of each patch.

Classes come from the site's probe. Words come from the logit lens: the LLM's final norm and output head on the states
(`final_norm` is already normed). It treats states as the last layer's, so early layers read poorly.

Shapes: S sites, T patches.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from probes.ops.geometry import GridPlacement

Head = Callable[[Tensor], Tensor]  # states to logits


def read_probe(probe: torch.nn.Module, states: Tensor) -> Tensor:
    """Return the logits of a probe, which reads states of any dtype in float32."""
    return probe(states.float())


def grid_box(view: GridPlacement, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return left, top, width and height of the grid as fractions of an image [H, W]."""
    height, width = size
    rows, cols = view
    return (
        cols.start_px / width,
        rows.start_px / height,
        cols.length_px / width,
        rows.length_px / height,
    )


def most_probable(
    states: dict[str, Tensor], heads: dict[str, Head], count: int
) -> tuple[Tensor, Tensor]:
    """Return the most probable classes or words and their probabilities, [count, S, T], of states f[1, T, d]."""
    ids = []
    probabilities = []
    for site, head in heads.items():
        best = head(states[site])[0].float().softmax(-1).topk(count)
        ids.append(best.indices.mT.cpu())
        probabilities.append(best.values.mT.cpu())
    return torch.stack(ids, 1), torch.stack(probabilities, 1)


def token_text(tokenizer, token: int) -> str:
    """Return the text of a token, or its name if the text is not visible (a blank, a part of a character)."""
    if token >= len(tokenizer):
        return f"<row {token}>"  # an output matrix can have more rows than the tokenizer has tokens
    text = tokenizer.decode([token]).strip()
    if text.isprintable() and text and "\ufffd" not in text:
        return text
    return tokenizer.convert_ids_to_tokens(token)
