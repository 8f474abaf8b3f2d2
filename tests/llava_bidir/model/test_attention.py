"""Attention masks, against a loop over all pairs of tokens."""

import pytest
import reference
import tiny_models
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llava_bidir import IMAGE_ATTENTION, register_image_attention
from llava_bidir.model.attention import bidirectional
from llava_bidir.model.modeling_llava_bidir import build_mask

MASKS = tuple(IMAGE_ATTENTION)  # tests/helpers/reference.py defines each of them


def built(name: str, is_image, padding, implementation: str = "sdpa"):
    config = tiny_models.llama_config()
    config._attn_implementation = implementation
    return build_mask(name, text_config=config, is_image=is_image, padding=padding)


@pytest.mark.parametrize("name", MASKS)
@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(st.text("ti", min_size=1, max_size=9), min_size=1, max_size=3),
    pad=st.sampled_from(["left", "right"]),
)
@example(rows=["tttt"], pad="right")
@example(rows=["tiitt"], pad="left")
@example(rows=["iit", "tiitiit"], pad="right")
@example(rows=["ttt", "iiii", "tiitt", "titit"], pad="left")
@example(rows=["ttt", "iiii", "tiitt", "titit"], pad="right")
def test_mask_equals_a_loop_over_pairs(name, rows, pad):
    """Query rows of padding are not compared."""
    ids, padding = tiny_models.ids(*rows, pad=pad)
    is_image = ids == tiny_models.IMAGE_ID
    mask = built(name, is_image, padding)[:, 0] & padding.bool()[:, :, None]
    expected = reference.mask_by_loop(name, is_image, padding)
    for sample, query, key in (mask != expected).nonzero().tolist():
        ours, reference_value = (bool(x[sample, query, key]) for x in (mask, expected))
        assert ours == reference_value, (
            f"{name}, {rows[sample]!r}: query {query} attends to key {key}"
        )


@pytest.mark.parametrize("name", MASKS)
def test_backend_that_drops_masks_is_refused(name):
    for backend in ("flash_attention_2", "flash_attention_3", "made_up"):
        with pytest.raises(ValueError, match="ignores masks.*sdpa"):
            built(
                name,
                is_image=torch.ones(1, 3, dtype=torch.bool),
                padding=None,
                implementation=backend,
            )


@pytest.mark.parametrize(
    ("block_ids", "message"),
    [
        (lambda is_image: is_image, r"returned torch.bool\[2, 6\]; expected .*torch.int64\[B, N\]"),
        (lambda is_image: bidirectional(is_image)[0], r"returned torch.int64\[6\]"),
        (lambda is_image: None, "returned NoneType"),
        (
            lambda is_image: is_image.long(),
            "puts text after the last image token into a block",
        ),  # 0 is an id
        (
            lambda is_image: torch.zeros_like(is_image, dtype=torch.long),
            "such text must stay causal",
        ),
    ],
)
def test_invalid_block_ids_are_rejected_on_registration(block_ids, message):
    with pytest.raises(ValueError, match=f"image_attention 'new' .*{message}"):
        register_image_attention("new", block_ids)
    assert "new" not in IMAGE_ATTENTION


def test_a_registered_mask_reaches_attention():
    name = "first_two"
    register_image_attention(
        name, lambda is_image: torch.where(is_image.cumsum(-1) <= 2, 0, -1).where(is_image, -1)
    )
    try:
        ids, padding = tiny_models.ids("tiiiit")
        mask = built(name, ids == tiny_models.IMAGE_ID, padding)[0, 0]
        assert mask[1, 2]
        assert not mask[1, 3]
        assert not mask[3, 4]
        with pytest.raises(ValueError, match="already registered"):
            register_image_attention(name, None)
    finally:
        del IMAGE_ATTENTION[name]
