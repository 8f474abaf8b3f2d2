"""The measured mask, against definitions in loops, on every family, and on models whose mask is broken."""

import pytest
import reference
import torch
from tiny_families import STOCK

import probes
from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.models import measured_mask
from probes.models.hooks import around, with_arguments

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("small_squares")]


@pytest.mark.parametrize("name", ["causal", "bidirectional", "prefix"])
@pytest.mark.parametrize("applied", [None, "causal", "bidirectional"])
def test_equals_the_definition_of_the_mask(checkpoints, name, applied):
    """Of the model's own forward, and of the one in which `probes` replaces the mask."""
    mllm = probes.load(checkpoints[name], applied)
    measured = mllm.measured_mask()
    before, *image, after = measured.blocks
    is_image = [False] * len(before) + [True] * sum(map(len, image)) + [False] * len(after)
    blocks = [block.tolist() for block in measured.blocks]
    for layer in measured.seen.tolist():
        for block, row in zip(blocks, layer, strict=True):
            for key, seen in enumerate(row):
                allowed = any(
                    reference.allowed(
                        applied or name,
                        is_image,
                        query,
                        key,
                    )
                    for query in block
                )
                assert seen == (allowed or key in block), (block, key)
    assert measured.disagreements() == []


@pytest.mark.parametrize("name", sorted(STOCK))
def test_every_family_attends_as_it_claims(name, load_family):
    measured = load_family(name).measured_mask()
    assert measured.disagreements() == []
    assert measured.seen.any(2).any(1).all(), "each layer mixes tokens"


def with_mask(mllm, layer: int, change):
    """Replace the mask that reaches one layer, 1..L, by what `change` makes of bool[1, 1, N, N]."""

    def replaced(arguments):
        mask = arguments["attention_mask"]
        if mask is None:  # sdpa's is_causal
            tokens = mllm.ids.shape[1] + measured_mask.TEXT_AFTER
            mask = torch.ones(
                1,
                1,
                tokens,
                tokens,
                dtype=torch.bool,
            ).tril()
        return {"attention_mask": change(mask)}

    with_arguments(mllm.layers[layer - 1], replaced)
    return mllm


def test_a_layer_that_drops_the_mask_is_named(checkpoints, monkeypatch):
    mllm = with_mask(probes.load(checkpoints["bidirectional"]), 2, torch.tril)
    expected = "image to later image: is not attended to, though the mask allows it, in layer_02"
    assert mllm.measured_mask().disagreements() == [expected]
    monkeypatch.setattr("probes.models.load.load", lambda *args, **kwargs: mllm)
    with pytest.raises(SystemExit, match=expected):
        main(["mask", str(checkpoints["bidirectional"])])


def test_a_layer_that_leaks_is_named(checkpoints):
    mllm = with_mask(probes.load(checkpoints["causal"]), 3, torch.ones_like)
    assert mllm.measured_mask().disagreements() == [
        f"{name}: is attended to, against the mask, in layer_03"
        for name in (
            "image to later image",
            "image to text after",
            "text before to image",
            "text to later text",
        )
    ]


def test_a_layer_without_a_gradient_is_an_error(checkpoints):
    mllm = probes.load(checkpoints["causal"])
    with (
        around(mllm.layers[1], without_graph),
        pytest.raises(UserError, match="mask of layer_02 is not measured"),
    ):
        mllm.measured_mask()


def without_graph(forward, *args, **kwargs):
    """Run a layer as a kernel does that has no gradient."""
    return torch.no_grad()(forward)(*args, **kwargs)
