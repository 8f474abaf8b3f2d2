"""Knockouts against masks written out by hand: Eq. 1, rows and columns of the prompt, and their guards."""

from functools import cache

import pytest
import reference
import tiny_models
import torch
from tolerances import assert_near, rounding

import probes
from llava_bidir.common.errors import UserError
from probes import Knockout

pytestmark = pytest.mark.numerics

QUESTION = "name the sky\nA. wall\nB. road\nof this"
ANSWERS = ["sky wall", "name this road of the rest"]
BLOCKED = torch.tensor([[False, True, False, True]])
CUTS = [  # rows, columns, layers
    ("image", "blocked", None),  # Eq. 1
    ("image", "blocked", [1, 3]),
    ("question", "image", None),
    ("question", "blocked", [2]),
    ("last", "image", [1, 2]),
    ("last", "prefix", None),
    ("answer", "last", None),
    ("answer", "answer", [1]),
    ("image", "prefix", [1]),
    ("image", "image", None),
    ("blocked", "image", [1]),
    (("question", "last", "answer"), ("blocked", "prefix"), [1, 3]),
]
MASKS = ["causal", "bidirectional", "prefix"]  # under the last, the prefix sees the image


@pytest.fixture(scope="module")
def mllms(checkpoints):
    """Models by mask and backend whose attention outweighs the residual stream."""

    @cache
    def load(mask: str, backend: str = "sdpa"):
        mllm = probes.load(checkpoints[mask], attn_implementation=backend)
        with torch.no_grad():
            for layer in mllm.decoder.layers:
                layer.self_attn.v_proj.weight *= 8
                layer.self_attn.o_proj.weight *= 8
        return mllm

    return load


def knockout_of(cut) -> Knockout:
    rows, columns, layers = cut
    return Knockout(
        blocked=BLOCKED if "blocked" in str(cut) else None,
        layers=layers,
        rows=rows,
        columns=columns,
    )


def states_by_hand(mllm, pixels, answer: list[int], cut) -> list[torch.Tensor]:
    """The states of all tokens after each layer, without a cache; of prefix and image only if there is no answer."""
    names = [{"prefix"}] * mllm.prefix_ids.shape[1]
    names += [{"image", "blocked"} if blocked else {"image"} for blocked in BLOCKED[0].tolist()]
    text = []
    if answer:
        # the line's end, "name" in two, the|sky|\n; A|.|wall; \n; B|.|road; \n|of|this; ASSISTANT:
        names += [{"question"}] * 17 + [{"last"}] + [{"answer"}] * (len(answer) - 1)
        text = mllm.chat.question_ids(QUESTION) + answer[:-1]
    rows, columns = ({x} if isinstance(x, str) else set(x) for x in cut[:2])

    def gone(layer, q, k) -> bool:
        is_cut = cut[2] is None or layer in cut[2]
        return is_cut and bool(names[q] & rows and names[k] & columns)

    masks = reference.masks_by_layer(mllm, len(names), gone)
    return reference.uncached_states(mllm, pixels=pixels, text=text, masks=masks)


CASES = [
    *zip(MASKS[:2] * 6, CUTS, strict=True),
    ("bidirectional", CUTS[0]),
    ("prefix", CUTS[0]),
    ("prefix", ("image", "prefix", [1])),
    ("prefix", ("prefix", "image", None)),
]


@pytest.mark.parametrize(("mask", "cut"), CASES, ids=str)
def test_log_probs_and_states_equal_the_mask_written_out(mllms, mask, cut):
    pixels = tiny_models.pixels(1)
    mllm = mllms(mask)
    expected = []
    for answer in mllm.chat.answer_ids(ANSWERS):
        state = states_by_hand(mllm, pixels=pixels, answer=answer, cut=cut)[-1]
        logits = mllm.model.lm_head(mllm.decoder.norm(state[0, -len(answer) :]))
        expected.append(logits.log_softmax(-1)[range(len(answer)), answer].sum())
    expected = torch.stack(expected)[None]
    tolerance = rounding(expected, 3)
    plain = mllm.answer_log_probs(pixels, QUESTION, ANSWERS)
    assert (plain - expected).abs().max() > 3 * tolerance["atol"], "the knockout matters"
    has_text = {"question", "last", "answer"} & {*knockout_of(cut).names("rows")}
    for backend in ("sdpa", "eager"):
        read = mllms(mask, backend)
        scores = read.answer_log_probs(
            pixels, question=QUESTION, answers=ANSWERS, knockout=knockout_of(cut)
        )
        torch.testing.assert_close(scores, expected, **tolerance)
        if not has_text:
            states = read.states(pixels, knockout=knockout_of(cut))
            for i, state in enumerate(states_by_hand(mllm, pixels=pixels, answer=[], cut=cut), 1):
                assert_near(states[f"layer_{i:02d}"], state[:, mllm.image_positions], i)


def test_each_row_of_a_batch_has_its_own_layers_and_columns(mllms):
    """In states and in scores; tokens may be on the grid."""
    mllm = mllms("causal")
    batch = tiny_models.pixels(1).expand(3, -1, -1, -1)
    blocked = torch.cat([BLOCKED, ~BLOCKED, ~BLOCKED]).unflatten(1, mllm.grid)
    layers = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])

    def states(pixels, knockout):
        return mllm.states(pixels, knockout=knockout)["layer_03"]

    def scores(pixels, knockout):
        return mllm.answer_log_probs(pixels, question=QUESTION, answers=ANSWERS, knockout=knockout)

    for read, rows in ((states, "image"), (scores, "last")):
        alone = [Knockout(BLOCKED, None, rows), Knockout(~BLOCKED, [2], rows), None]
        expected = torch.cat([read(batch[:1], one) for one in alone])
        found = read(batch, Knockout(blocked, layers, rows))
        assert_near(found, expected, 3)


def test_a_knockout_that_changes_no_allowed_pair_is_an_error(mllms):
    mllm = mllms("causal")
    pixels = tiny_models.pixels(2)
    cuts = [Knockout(rows="image", columns="question"), Knockout(rows="question", columns="answer")]
    of_second_row = Knockout(torch.cat([BLOCKED, BLOCKED & False]), None, "last")
    for row, knockout in (*((0, cut) for cut in cuts), (1, of_second_row)):
        with pytest.raises(UserError, match=f"changes nothing in row {row}"):
            mllm.answer_log_probs(pixels, question=QUESTION, answers=ANSWERS, knockout=knockout)


@pytest.mark.parametrize("rows", ["image", "last"])
def test_a_knockout_of_no_token_is_an_error(mllms, rows):
    """Of a batch in which some image has one, the others may have none."""
    mllm = mllms("causal")
    pixels = tiny_models.pixels(2)
    nothing = Knockout(torch.zeros(2, *mllm.grid, dtype=torch.bool), rows=rows)
    with pytest.raises(UserError, match="blocked has no token"):
        mllm.answer_log_probs(pixels, question=QUESTION, answers=ANSWERS, knockout=nothing)
    in_one = torch.cat([BLOCKED, BLOCKED & False])
    mllm.states(pixels, knockout=Knockout(in_one))
    with pytest.raises(UserError, match="layers of a knockout are none"):
        mllm.states(pixels, knockout=Knockout(in_one, layers=[]))


def test_what_does_not_fit_is_an_error(mllms):
    mllm = mllms("causal")
    pixels = tiny_models.pixels(1)
    with pytest.raises(UserError, match="neither rows nor columns name them"):
        Knockout(BLOCKED, rows="last", columns="image")
    with pytest.raises(UserError, match="no text after the image runs here"):
        mllm.states(pixels, knockout=Knockout(rows="last", columns="image"))
    with pytest.raises(ValueError, match=r"blocked must be bool\[1, 4\]"):
        mllm.states(pixels, knockout=Knockout(BLOCKED[[0, 0]]))
    with pytest.raises(ValueError, match="blocking 1 tokens leaves image token 0 of image 0"):
        first = torch.arange(3)[None] == 0
        Knockout(first).cut(torch.ones(1, 1, 3, 3).bool().tril(), torch.ones(3).bool())


@pytest.mark.parametrize("mask", MASKS)
def test_a_knockout_that_reaches_no_layer_is_an_error(mllms, mask, monkeypatch):
    """A model that stops handing masks to its layers makes the knockout a no-op; that must not pass."""
    mllm = mllms(mask)
    layer = type(mllm.decoder.layers[0])
    forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda self, h, attention_mask=None, **kw: forward(self, h, **kw)
    )
    with pytest.raises(RuntimeError, match="runs with another mask"):
        mllm.states(tiny_models.pixels(1), knockout=Knockout(BLOCKED))
