"""Knockouts with rows and columns of the prompt, against masks written out by hand."""

import pytest
import reference
import tiny_models
import torch
from tolerances import rounding

import probes
from llava_bidir.common.errors import UserError
from probes import Knockout

pytestmark = pytest.mark.numerics

QUESTION = "name the sky\nA. wall\nB. road\nof this"
ANSWERS = ["sky wall", "name this road of the rest"]
BLOCKED = torch.tensor([[False, True, False, True]])
CUTS = [  # rows, columns, layers
    ("image", "blocked", None),
    ("question", "image", None),
    ("question", "blocked", [2]),
    ("last", "image", [1, 2]),
    ("last", "question", None),
    ("last", "prefix", None),
    ("answer", "image", None),
    ("answer", "last", None),
    ("answer", "answer", [1]),
    ("image", "prefix", [1]),
    ("image", "image", None),
    ("blocked", "image", [1]),
    (("question", "last", "answer"), ("blocked", "prefix"), [1, 3]),
]
BACKENDS = ["sdpa", "eager"]


@pytest.fixture(scope="module")
def mllms(checkpoints):
    """Models by mask and backend whose attention outweighs the residual stream."""
    loaded = {}

    def load(mask: str, backend: str = "sdpa"):
        if (mask, backend) not in loaded:
            mllm = probes.load(str(checkpoints[mask]), attn_implementation=backend)
            with torch.no_grad():
                for layer in mllm.decoder.layers:
                    layer.self_attn.v_proj.weight *= 8
                    layer.self_attn.o_proj.weight *= 8
            loaded[mask, backend] = mllm
        return loaded[mask, backend]

    return load


def sets_of_tokens(mllm, answer: list[int]) -> list[set[str]]:
    """The sets of each token of prefix, image, question and answer, written out."""
    prefix = mllm.prefix_ids.shape[1]
    names = [{"prefix"}] * prefix
    names += [{"image", "blocked"} if blocked else {"image"} for blocked in BLOCKED[0].tolist()]
    # the line's end, "name" in two, the|sky|\n; A|.|wall; \n; B|.|road; \n|of|this; ASSISTANT:
    names += [{"question"}] * 17 + [{"last"}]
    return names + [{"answer"}] * len(answer)


def masks_by_hand(
    mllm,
    names: list[set[str]],
    rows,
    columns,
    layers,
) -> list[torch.Tensor]:
    """bool[1, N, N] by layer, without the pairs of rows and columns."""
    rows = {rows} if isinstance(rows, str) else set(rows)
    columns = {columns} if isinstance(columns, str) else set(columns)

    def gone(layer, q, k) -> bool:
        cut = layers is None or layer in layers
        return cut and bool(names[q] & rows and names[k] & columns)

    return reference.masks_by_layer(mllm, len(names), gone)


def states_by_hand(
    mllm,
    pixels,
    answer: list[int],
    cut,
) -> list[torch.Tensor]:
    """The states of all tokens after each layer, without a cache."""
    masks = masks_by_hand(mllm, sets_of_tokens(mllm, answer), *cut)
    text = mllm.chat.question_ids(QUESTION) + answer
    return reference.uncached_states(mllm, pixels, text, masks)


def log_probs_by_hand(mllm, pixels, cut) -> torch.Tensor:
    scores = []
    for answer in mllm.chat.answer_ids(ANSWERS):
        state = states_by_hand(mllm, pixels, answer[:-1], cut)[-1]
        logits = mllm.model.lm_head(mllm.decoder.norm(state[0, -len(answer) :]))
        scores.append(logits.log_softmax(-1)[range(len(answer)), answer].sum())
    return torch.stack(scores)[None]


@pytest.mark.parametrize("mask", ["causal", "bidirectional", "prefix"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_log_probs_equal_the_mask_written_out(mllms, cut, mask):
    blocked = BLOCKED if "blocked" in str(cut) else None
    knockout = Knockout(blocked, cut[2], cut[0], cut[1])
    pixels = tiny_models.pixels(1)
    expected = log_probs_by_hand(mllms(mask), pixels, cut)
    plain = mllms(mask).answer_log_probs(pixels, QUESTION, ANSWERS)
    tolerance = rounding(expected, 3)
    assert (plain - expected).abs().max() > 3 * tolerance["atol"], "the knockout matters"
    for backend in BACKENDS:
        scores = mllms(mask, backend).answer_log_probs(pixels, QUESTION, ANSWERS, knockout)
        torch.testing.assert_close(scores, expected, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [CUTS[4], CUTS[6], CUTS[7], CUTS[8], CUTS[12]], ids=str)
def test_generation_with_a_cache_equals_uncached_forwards(mllms, cut, backend):
    mllm = mllms("bidirectional", backend)
    knockout = Knockout(BLOCKED if "blocked" in str(cut) else None, cut[2], cut[0], cut[1])
    pixels = tiny_models.pixels(1)
    states = []
    hook = mllm.decoder.norm.register_forward_hook(lambda _, args, out: states.append(out[0, -1]))
    shown = []
    options = {"max_new_tokens": 4, "on_token": shown.append}
    probes.models.answers.generate_answer(mllm, pixels, QUESTION, knockout, **options)
    hook.remove()
    answer = []
    for state in states:
        expected = states_by_hand(mllm, pixels, answer, cut)[-1]
        expected = mllm.decoder.norm(expected[0, -1])
        torch.testing.assert_close(state, expected, **rounding(expected, 3))
        answer.append(int(mllm.model.lm_head(expected).argmax()))
    assert len(states) > 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["causal", "bidirectional", "prefix"])
@pytest.mark.parametrize("cut", [CUTS[0], *CUTS[9:12]], ids=str)
def test_states_equal_the_mask_written_out(
    mllms,
    cut,
    mask,
    backend,
):
    mllm = mllms(mask, backend)
    knockout = Knockout(BLOCKED if "blocked" in str(cut) else None, cut[2], cut[0], cut[1])
    pixels = tiny_models.pixels(1)
    prefix = mllm.prefix_ids.shape[1]
    states = mllm.states(pixels, knockout=knockout)
    in_rows = mllm.states(pixels, knockout=knockout, rows=[0]) if backend == "sdpa" else states
    for i, state in enumerate(states_by_hand(mllm, pixels, [], cut), 1):
        expected = state[:, prefix : prefix + tiny_models.TOKENS]
        for found in (states, in_rows):
            torch.testing.assert_close(found[f"layer_{i:02d}"], expected, **rounding(expected, i))


def test_blocked_tokens_on_the_grid_are_those_in_a_row(mllms):
    mllm = mllms("causal")
    pixels = tiny_models.pixels(2)
    blocked = torch.cat([BLOCKED, ~BLOCKED, ~BLOCKED])
    rows = [0, 0, 1]
    in_a_row = mllm.states(pixels, knockout=Knockout(blocked), rows=rows)
    on_the_grid = blocked.unflatten(1, mllm.grid)
    found = mllm.states(pixels, knockout=Knockout(on_the_grid), rows=rows)
    for site, expected in in_a_row.items():
        assert torch.equal(found[site], expected), site


def test_rows_of_the_prefix_are_cut_where_it_sees_the_image(mllms):
    cut = ("prefix", "image", None)
    mllm = mllms("prefix")
    pixels = tiny_models.pixels(1)
    states = mllm.states(pixels, knockout=Knockout(rows="prefix", columns="image"))
    prefix = mllm.prefix_ids.shape[1]
    expected = states_by_hand(mllm, pixels, [], cut)[-1][:, prefix : prefix + tiny_models.TOKENS]
    torch.testing.assert_close(states["layer_03"], expected, **rounding(expected, 3))
    assert not torch.allclose(states["layer_03"], mllm.states(pixels)["layer_03"], atol=1e-3)


def test_each_row_of_a_batch_has_its_own_layers_and_columns(mllms):
    mllm = mllms("causal")
    pixels = tiny_models.pixels(1)
    blocked = torch.cat([BLOCKED, ~BLOCKED, ~BLOCKED])
    layers = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])
    batch = mllm.answer_log_probs(
        pixels.expand(3, -1, -1, -1), QUESTION, ANSWERS, Knockout(blocked, layers, "last")
    )
    alone = [Knockout(BLOCKED, None, "last"), Knockout(~BLOCKED, [2], "last"), None]
    expected = [mllm.answer_log_probs(pixels, QUESTION, ANSWERS, one) for one in alone]
    expected = torch.cat(expected)
    torch.testing.assert_close(batch, expected, **rounding(expected, 3))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [("image", "question"), ("question", "last"), ("question", "answer"), ("prefix", "image")],
)
def test_a_knockout_that_changes_no_allowed_pair_is_an_error(mllms, rows, columns):
    pixels = tiny_models.pixels(1)
    knockout = Knockout(rows=rows, columns=columns)
    with pytest.raises(UserError, match="changes nothing in row 0 .* no token of"):
        mllms("causal").answer_log_probs(pixels, QUESTION, ANSWERS, knockout)
    blocked = torch.cat([BLOCKED, BLOCKED & False])
    with pytest.raises(UserError, match="changes nothing in row 1"):
        mllms("causal").answer_log_probs(
            pixels.expand(2, -1, -1, -1), QUESTION, ANSWERS, Knockout(blocked, None, "last")
        )


def test_names_that_do_not_fit_are_errors(mllms):
    mllm = mllms("causal")
    pixels = tiny_models.pixels(1)
    with pytest.raises(UserError, match="rows of a knockout are 'patches'"):
        Knockout(BLOCKED, rows="patches")
    with pytest.raises(UserError, match="neither rows nor columns name them"):
        Knockout(BLOCKED, rows="last", columns="image")
    with pytest.raises(UserError, match="no text after the image runs here"):
        mllm.states(pixels, knockout=Knockout(rows="last", columns="image"))
