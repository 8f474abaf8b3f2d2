"""Rows of an image that share layers, against each row in a forward of its own."""

import pytest
import torch
from tolerances import rounding

import probes
from probes import Knockout

pytestmark = pytest.mark.numerics

LAYERS = 3
WINDOWS = [[], [1], [2], [3], [1, 2], [2, 3], [1, 3], [1, 2, 3]]  # all sets of layers
BLOCKED = torch.tensor([[False, True, False, True], [True, False, False, False], [False] * 4])
# image, blocked tokens and layers of each row: two kinds of cuts, and none, on three images in mixed order
ROWS = [
    (image, blocked, window) for window in WINDOWS for blocked in range(3) for image in (2, 0, 1)
]
IMAGES = [image for image, _, _ in ROWS]


def knockout_of(rows: list[tuple]) -> Knockout:
    layers = torch.tensor(
        [[layer in window for layer in range(1, LAYERS + 1)] for _, _, window in rows]
    )
    return Knockout(BLOCKED[[blocked for _, blocked, _ in rows]], layers)


def test_rows_equal_a_forward_each(mllm, pixels):
    """States of another image, row or layer are 1e-3 away and more, as the test below shows."""
    together = mllm.states(pixels, knockout=knockout_of(ROWS), rows=IMAGES)
    for i, row in enumerate(ROWS):
        alone = mllm.states(pixels[[row[0]]], knockout=knockout_of([row]))
        for depth, site in enumerate(mllm.sites):
            torch.testing.assert_close(
                together[site][[i]], alone[site], **rounding(alone[site], max(depth, 1))
            )


def steer(states: torch.Tensor) -> torch.Tensor:
    return 0.5 * states.flip(0)


CHANGES = {
    **{
        f"layers {window}": {"knockout": Knockout(BLOCKED[[0, 1, 0]], window)}
        for window in WINDOWS[1:]
    },
    "by row": {
        "knockout": Knockout(
            BLOCKED, torch.tensor([[False, False, True], [False, True, False], [True] * 3])
        )
    },
    "nothing": {"knockout": Knockout(BLOCKED[[2, 2, 2]])},
    **{site: {"hooks": {site: steer}} for site in ("adapter", "layer_01", "layer_02", "layer_03")},
    "both": {"hooks": {"layer_02": steer}, "knockout": Knockout(BLOCKED, [3])},
    "rows": {"hooks": {"layer_02": steer}, "rows": [2, 0, 2, 1]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_starting_from_known_states_equals_the_full_forward(mllm, pixels, change):
    """To the last bit where layers run on the same shapes; with rows, those before the change run on other batches."""
    sites = ["layer_01", "layer_03", "final_norm"]
    full = mllm.states(pixels, sites, **CHANGES[change])
    plain = mllm.states(pixels, sites)
    states = mllm.states(pixels, sites, known=plain, **CHANGES[change])
    assert list(states) == list(full)
    # a product of another number of rows is summed in another order: some roundings of float32, of the largest state
    rounding = 1e-5 if change == "rows" else 0
    for site, state in full.items():
        torch.testing.assert_close(
            states[site], state, rtol=0, atol=rounding * state.abs().max().item()
        )
    assert all(
        torch.equal(state, plain[site]) for site, state in mllm.states(pixels, sites).items()
    ), "layers come back"


def multiply_embeddings(mllm, pixels):
    with torch.no_grad():
        mllm.model.get_input_embeddings().weight.mul_(2)


OTHERS = {  # what is known, and what is changed after it was read
    "other pixels, or of a changed": (lambda mllm, pixels: mllm.states(pixels.flip(0)), None),
    "of a changed forward": (
        lambda mllm, pixels: mllm.states(pixels, hooks={"adapter": steer}),
        None,
    ),
    "image tokens: bidirectional, but the model's is causal": (
        lambda mllm, pixels: mllm.with_attention("bidirectional").states(pixels),
        None,
    ),
    "other weights": (None, multiply_embeddings),
    "another prefix": (None, lambda mllm, pixels: mllm.set_prefix([3, 4])),
    "of other pixels": (None, lambda mllm, pixels: pixels.mul_(2)),
}


@pytest.mark.parametrize("message", OTHERS)
def test_known_states_of_something_else_are_an_error(checkpoints, pixels, message):
    mllm = probes.load(str(checkpoints["causal"]))
    pixels = pixels.clone()
    read, edit = OTHERS[message]
    known = read(mllm, pixels) if read else mllm.states(pixels)
    if edit:
        edit(mllm, pixels)
    with pytest.raises(ValueError, match=f"known states .*{message}"):
        mllm.states(pixels, knockout=Knockout(BLOCKED, [3]), known=known)


def test_hooks_compose_with_knockouts_and_rows(mllm, pixels):
    change = {"knockout": Knockout(BLOCKED[:2], [3]), "hooks": {"layer_02": lambda s: 2 * s}}
    together = mllm.states(pixels, rows=[0, 2], **change)["layer_03"]
    alone = mllm.states(pixels[[0, 2]], **change)["layer_03"]
    torch.testing.assert_close(together, alone)
