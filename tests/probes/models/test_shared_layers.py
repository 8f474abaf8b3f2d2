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


def test_each_layer_runs_only_what_differs(mllm, pixels):
    """A row begins at its first cut that no other row of its image has; a row that blocks nothing has none."""
    ran: dict[int, int] = {}
    layers = mllm.decoder.layers

    def count(i):
        return lambda _, args, out: ran.__setitem__(
            i, len(out[0] if isinstance(out, tuple) else out)
        )

    hooks = [layer.register_forward_hook(count(i)) for i, layer in enumerate(layers, 1)]
    encoded = mllm.model.model.vision_tower.register_forward_hook(
        lambda _, args, out: ran.__setitem__(0, len(args[0]))
    )
    mllm.states(pixels, knockout=knockout_of(ROWS), rows=IMAGES)
    [hook.remove() for hook in (*hooks, encoded)]
    histories = [
        3 * (1 + 2 * (2**layer - 1)) for layer in range(1, LAYERS + 1)
    ]  # uncut, and each way to be cut so far
    assert ran == dict(enumerate([3, *histories]))


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


@pytest.mark.parametrize(
    ("change", "expected"),
    [("layers [2, 3]", [2, 3]), ("layer_02", [2, 3]), ("adapter", [1, 2, 3]), ("rows", [2, 3])],
)
def test_only_layers_from_the_first_change_on_run(
    checkpoints,
    pixels,
    change,
    expected,
):
    mllm = probes.load(str(checkpoints["bidirectional"]))
    ran = []
    plain = mllm.states(pixels)
    for number, layer in enumerate(mllm.decoder.layers, 1):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    mllm.model.model.vision_tower.register_forward_hook(lambda *_: ran.append(0))
    mllm.states(pixels, known=plain, **CHANGES[change])
    assert ran == expected


@pytest.mark.parametrize(
    ("own", "other"), [("causal", "bidirectional"), ("bidirectional", "causal")]
)
def test_known_states_of_another_forward_are_an_error(
    checkpoints,
    pixels,
    own,
    other,
):
    mllm = probes.load(str(checkpoints[own]))
    block = Knockout(BLOCKED, [3])
    plain = mllm.states(pixels)
    changed = [mllm.states(pixels, knockout=block), mllm.states(pixels, hooks={"adapter": steer})]
    for known in (mllm.states(pixels.flip(0)), mllm.states(pixels, rows=[0, 1, 2]), *changed):
        with pytest.raises(
            ValueError, match="known states are of other pixels, or of a changed forward"
        ):
            mllm.states(pixels, knockout=block, known=known)
    with pytest.raises(
        ValueError, match=f"another mask among image tokens: {own}, but the model's is {other}"
    ):
        mllm.with_attention(other).states(pixels, knockout=block, known=plain)
    full = mllm.states(pixels, knockout=block)
    states = mllm.states(pixels.clone(), knockout=block, known=plain)
    assert all(torch.equal(states[site], full[site]) for site in full)


def _edit_weights(mllm, pixels):
    mllm.model.get_input_embeddings().weight.mul_(2)


EDITS = {
    "known states are of other weights": _edit_weights,
    "known states are of another prefix": lambda mllm, pixels: mllm.set_prefix([3, 4]),
    "known states are of other pixels": lambda mllm, pixels: pixels.mul_(2),
}


@pytest.mark.parametrize("message", EDITS)
def test_known_states_from_before_an_edit_are_an_error(checkpoints, pixels, message):
    mllm = probes.load(str(checkpoints["causal"]))
    pixels = pixels.clone()
    plain = mllm.states(pixels)
    with torch.no_grad():
        EDITS[message](mllm, pixels)
    with pytest.raises(ValueError, match=message):
        mllm.states(pixels, knockout=Knockout(BLOCKED, [3]), known=plain)


def test_a_misfit_is_an_error(mllm, pixels):
    with pytest.raises(ValueError, match=r"blocked must be bool\[2, 4\]"):
        mllm.states(pixels, knockout=Knockout(BLOCKED), rows=[2, 0])
    with pytest.raises(ValueError, match=r"row 1 is of image 3; expected 0 to 2"):
        mllm.states(pixels, knockout=Knockout(BLOCKED[:2]), rows=[2, 3])
