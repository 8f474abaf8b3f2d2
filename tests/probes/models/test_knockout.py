"""Eq. 1 against an attention written out, and its guards."""

import itertools

import pytest
import reference
import torch
from tolerances import rounding

from probes import Knockout

pytestmark = pytest.mark.numerics


BLOCKED = torch.tensor(
    [[False, True, False, True], [True, False, False, False], [False, False, False, False]]
)


BY_ROW = torch.tensor(
    [[True, False, True], [False, True, True], [True, True, True]]
)  # row of the batch, layer


CUTS = {  # knockout: whether no image token may attend to image token k of image b in layer i
    "all layers": (Knockout(BLOCKED), lambda b, i, k: BLOCKED[b, k]),  # Eq. 1
    "one layer": (Knockout(BLOCKED, [2]), lambda b, i, k: i == 2 and BLOCKED[b, k]),
    "window": (Knockout(BLOCKED, [2, 3]), lambda b, i, k: i in (2, 3) and BLOCKED[b, k]),
    "set of layers": (Knockout(BLOCKED, [1, 3]), lambda b, i, k: i in (1, 3) and BLOCKED[b, k]),
    "layers by row": (
        Knockout(BLOCKED, BY_ROW),
        lambda b, i, k: BY_ROW[b, i - 1] and BLOCKED[b, k],
    ),
}


def reference_states(mllm, pixels, cut):
    """States at image positions after each layer, by an attention written out without the pairs in `cut`."""
    first = mllm.prefix_ids.shape[1]
    by_image = []
    for b in range(len(pixels)):

        def gone(layer, q, k, b=b) -> bool:
            return q >= first and k >= first and bool(cut(b, layer, k - first))

        by_image.append(reference.masks_by_layer(mllm, mllm.ids.shape[1], gone))
    masks = [torch.cat(of_layer) for of_layer in zip(*by_image, strict=True)]
    states = reference.uncached_states(mllm, pixels, [], masks)
    return [state[:, first:] for state in states]


@pytest.mark.parametrize("name", CUTS)
def test_equals_an_attention_written_out(mllm, pixels, name):
    knockout, cut = CUTS[name]
    states = mllm.states(pixels, knockout=knockout)
    for i, expected in enumerate(reference_states(mllm, pixels, cut), 1):
        torch.testing.assert_close(states[f"layer_{i:02d}"], expected, **rounding(expected, i))


@pytest.mark.parametrize(
    "is_image", ["1111", "001111", "0011011"], ids=["image", "prefix", "row end"]
)
@pytest.mark.parametrize("prefix_runs_along", [False, True])
def test_cut_touches_pairs_of_image_tokens_only(is_image, prefix_runs_along):
    """Rows of the prefix (where it sees the image) and of what ends a row of the image stay as they are, bit by bit."""
    is_image = [flag == "1" for flag in is_image]
    first = is_image.index(True)
    tokens = len(is_image)
    queries = tokens if prefix_runs_along else tokens - first
    mask = (
        torch.rand(
            2,
            1,
            queries,
            tokens,
            generator=torch.Generator().manual_seed(0),
        )
        < 0.7
    )
    mask[..., first] = True
    blocked = torch.tensor([[False, True, False, True], [False, False, True, False]])
    cut = Knockout(blocked).cut(mask, torch.tensor(is_image))
    for b, q, k in itertools.product(range(2), range(queries), range(tokens)):
        pair = is_image[tokens - queries + q] and is_image[k]
        assert cut[b, 0, q, k] == (
            mask[b, 0, q, k] and not (pair and blocked[b, sum(is_image[:k])])
        )


def test_row_without_keys_raises():
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    blocked = torch.tensor([[False, False, False], [True, False, False]])
    with pytest.raises(ValueError, match="blocking 1 tokens leaves image token 0 of image 1"):
        Knockout(blocked).cut(mask, torch.ones(3, dtype=torch.bool))


def test_misfits_are_errors(mllm, pixels):
    with pytest.raises(ValueError, match=r"blocked must be bool\[3, 4\]"):
        mllm.states(pixels, knockout=Knockout(BLOCKED[:2]))


def test_knockout_that_reaches_no_layer_raises(mllm, pixels, monkeypatch):
    """A model that stops handing masks to its layers makes the knockout a no-op; that must not pass."""
    layer = type(mllm.decoder.layers[0])
    forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda self, h, attention_mask=None, **kw: forward(self, h, **kw)
    )
    with pytest.raises(RuntimeError, match="runs with another mask"):
        mllm.states(pixels, knockout=Knockout(BLOCKED))
