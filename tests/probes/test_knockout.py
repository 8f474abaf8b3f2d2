"""Eq. 1 against an attention written out, and its guards."""

import pytest
import reference
import tiny
import torch

import probes
from probes import Knockout

MASKS = ("causal", "bidirectional")


@pytest.fixture(scope="module", params=MASKS)
def mllm(request, checkpoints):
    return probes.load(str(checkpoints[request.param]))


@pytest.fixture(scope="module")
def pixels():
    return tiny.pixels(3)


BLOCKED = torch.tensor([[False, True, False, True], [True, False, False, False], [False, False, False, False]])


def reference_states(mllm, pixels, blocked, layers):
    """States at image positions with every pair (image query, blocked key) cut in `layers`, by loops."""
    prefix, tokens = mllm.prefix_ids.shape[1], tiny.TOKENS
    adapter = mllm.states(pixels, ["adapter"])["adapter"]
    inputs = torch.cat([mllm._decoder.embed_tokens(mllm.prefix_ids).expand(len(pixels), -1, -1), adapter], 1)
    is_image = [False] * prefix + [True] * tokens
    masks = []
    for layer in range(1, 4):
        mask = torch.zeros(len(pixels), len(is_image), len(is_image), dtype=torch.bool)
        for b in range(len(pixels)):
            for q in range(len(is_image)):
                for k in range(len(is_image)):
                    cut = layer in layers and is_image[q] and is_image[k] and bool(blocked[b, k - prefix])
                    mask[b, q, k] = reference.allowed(mllm.image_attention, is_image, q, k) and not cut
        masks.append(mask)
    states = reference.llama_states(mllm._decoder, inputs, masks, torch.arange(len(is_image)))
    return [state[:, prefix:] for state in states]


@pytest.mark.parametrize("layers", [None, [2], [1, 3], [2, 3]])
def test_equals_an_attention_written_out(mllm, pixels, layers):
    states = mllm.states(pixels, knockout=Knockout(BLOCKED, layers))
    expected = reference_states(mllm, pixels, BLOCKED, layers or [1, 2, 3])
    for i, layer in enumerate(expected, 1):
        torch.testing.assert_close(states[f"layer_{i:02d}"], layer, rtol=1e-4, atol=1e-4)


def test_changes_what_it_should(mllm, pixels):
    """Guards the test above: were the cut lost on both sides, they would agree."""
    plain, cut = mllm.states(pixels), mllm.states(pixels, knockout=Knockout(BLOCKED))
    moved = [(cut[f"layer_{i:02d}"] - plain[f"layer_{i:02d}"]).abs().amax((1, 2)) for i in (1, 2, 3)]
    assert all(m[0] > 1e-3 and m[1] > 1e-3 for m in moved)
    assert all(m[2] == 0 for m in moved), "an image with nothing blocked stays as it is"
    assert torch.equal(plain["adapter"], cut["adapter"])


def test_blocking_nothing_changes_nothing(mllm, pixels):
    plain = mllm.states(pixels)
    for knockout in (Knockout(torch.zeros(3, 4, dtype=torch.bool)), Knockout(BLOCKED, layers=[])):
        cut = mllm.states(pixels, knockout=knockout)
        assert all(torch.equal(plain[site], cut[site]) for site in mllm.sites)


def test_only_later_layers_change_under_a_window(mllm, pixels):
    plain, cut = mllm.states(pixels), mllm.states(pixels, knockout=Knockout(BLOCKED, layers=[2]))
    assert torch.equal(plain["layer_01"], cut["layer_01"])
    assert not torch.equal(plain["layer_02"], cut["layer_02"])


def test_conditions_in_one_batch_equal_one_by_one(mllm, pixels):
    together = mllm.states(pixels[[0, 0, 1]], knockout=Knockout(BLOCKED[[0, 1, 1]]))["layer_03"]
    for row, (image, condition) in enumerate([(0, 0), (0, 1), (1, 1)]):
        alone = mllm.states(pixels[[image]], knockout=Knockout(BLOCKED[[condition]]))["layer_03"]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_worked_example():
    mask = torch.tensor([[[[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]]).bool()  # rows i i i, columns p i i i
    cut = Knockout(torch.tensor([[False, True, False]])).cut(mask, torch.tensor([False, True, True, True]))
    assert torch.equal(cut[0, 0].int(), torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]]).int())


def test_rows_of_other_tokens_stay():
    """Rows and columns p i n i with n the end of a row of image tokens; the first image token is blocked."""
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    cut = Knockout(torch.tensor([[True, False]])).cut(mask, torch.tensor([False, True, False, True]))
    assert cut[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]


def test_row_without_keys_raises():
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    blocked = torch.tensor([[False, False, False], [True, False, False]])
    with pytest.raises(ValueError, match="blocking 1 tokens leaves image token 0 of image 1"):
        Knockout(blocked).cut(mask, torch.ones(3, dtype=torch.bool))


def test_additive_mask_is_refused():
    """Written into an additive mask, False is 0.0, which allows: the knockout would silently do nothing."""
    with pytest.raises(ValueError, match="boolean mask, got torch.float32"):
        Knockout(BLOCKED).cut(torch.zeros(3, 1, 4, 6), torch.arange(6) > 1)


def test_misfits_are_errors(mllm, pixels):
    with pytest.raises(ValueError, match=r"blocked must be bool\[3, 4\]"):
        mllm.states(pixels, knockout=Knockout(BLOCKED[:2]))
    with pytest.raises(ValueError, match=r"blocked must be bool\[3, 4\].*int64"):
        mllm.states(pixels, knockout=Knockout(BLOCKED.long()))
    with pytest.raises(ValueError, match=r"layer 4 is out of range; this model has layers 1..3"):
        mllm.states(pixels, knockout=Knockout(BLOCKED, layers=[4]))


def test_knockout_that_reaches_no_layer_raises(mllm, pixels, monkeypatch):
    """A model that stops handing masks to its layers makes the knockout a no-op; that must not pass."""
    layer = type(mllm._decoder.layers[0])
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, h, attention_mask=None, **kw: forward(self, h, **kw))
    with pytest.raises(RuntimeError, match="attends under another mask"):
        mllm.states(pixels, knockout=Knockout(BLOCKED))
