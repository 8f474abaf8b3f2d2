"""Text of tokens and the place of the grid; tests of the session compare classes and words with the Python API."""

import pytest
from transformers import AutoTokenizer

from probes.lab.photos import grid_box
from probes.lab.session import token_text
from probes.ops.geometry import Geometry, ResizeRule


def test_text_of_a_token_is_visible(checkpoints):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["causal"])
    text = {
        name: token_text(tokenizer, tokenizer.convert_tokens_to_ids(name))
        for name in ("▁sky", "▁", "<0xE2>", "a")
    }
    assert text == {
        "▁sky": "sky",
        "▁": "▁",
        "<0xE2>": "<0xE2>",
        "a": "a",
    }
    assert token_text(tokenizer, len(tokenizer)) == f"<row {len(tokenizer)}>"


def test_box_of_a_padded_image_exceeds_it():
    padded = Geometry((2, 2), 8, 8, ResizeRule("pad")).view((4, 8))
    assert grid_box(padded, (4, 8)) == (0.0, -0.5, 1.0, 2.0)
    border = Geometry((27, 27), 384, 378).view((100, 200))
    assert grid_box(border, (100, 200)) == pytest.approx((0, 0, 378 / 384, 378 / 384))
