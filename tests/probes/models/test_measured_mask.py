"""The measured mask, against definitions in loops, on every family, and on models whose mask is broken."""

import pytest
import reference
import torch
from tiny_families import STOCK

import probes
from probes.cli import main
from probes.models import measured_mask

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("small_squares")]


@pytest.mark.parametrize("name", ["causal", "bidirectional", "prefix"])
@pytest.mark.parametrize("applied", [None, "causal", "bidirectional"])
def test_equals_the_definition_of_the_mask(checkpoints, name, applied):
    """Of the model's own forward, and of the one in which `probes` replaces the mask."""
    mllm = probes.load(str(checkpoints[name]), applied)
    measured = mllm.measured_mask()
    before, *image, after = measured.blocks
    is_image = [False] * len(before) + [True] * sum(map(len, image)) + [False] * len(after)
    blocks = [block.tolist() for block in measured.blocks]
    for layer in measured.moved.tolist():
        for query, row in enumerate(layer):
            for block, moved in zip(blocks, row, strict=True):
                seen = any(
                    reference.allowed(applied or name, is_image, query, key) for key in block
                )
                assert moved == (seen or query in block), (query, block)
    assert measured.disagreements() == []


@pytest.mark.parametrize("name", sorted(STOCK))
def test_every_family_attends_as_it_claims(name, load_family):
    measured = load_family(name).measured_mask()
    assert measured.disagreements() == []
    assert measured.moved.any(2).any(1).all(), "each layer mixes tokens"


def with_mask(mllm, layer: int, change):
    """Replace the mask that reaches one layer, 1..L, by what `change` makes of bool[1, 1, N, N]."""

    def replace(_, args, kwargs):
        mask = kwargs["attention_mask"]
        if mask is None:  # sdpa's is_causal
            tokens = kwargs["hidden_states"] if not args else args[0]
            mask = torch.ones(
                1,
                1,
                tokens.shape[1],
                tokens.shape[1],
                dtype=torch.bool,
            ).tril()
        return args, {**kwargs, "attention_mask": change(mask)}

    mllm.layers[layer - 1].register_forward_pre_hook(replace, with_kwargs=True)
    return mllm


def test_a_layer_that_drops_the_mask_is_named(checkpoints, monkeypatch, capsys):
    mllm = with_mask(probes.load(str(checkpoints["bidirectional"])), 2, torch.tril)
    expected = "image to later image: is not attended to, though the mask allows it, in layer_02"
    assert mllm.measured_mask().disagreements() == [expected]
    monkeypatch.setattr("probes.models.load.load", lambda *args, **kwargs: mllm)
    with pytest.raises(SystemExit) as exit_:
        main(["mask", str(checkpoints["bidirectional"])])
    assert expected in str(exit_.value.code)
    assert "67%" in capsys.readouterr().out, "two of three layers"


def test_a_layer_that_leaks_is_named(checkpoints):
    mllm = with_mask(probes.load(str(checkpoints["causal"])), 3, torch.ones_like)
    assert mllm.measured_mask().disagreements() == [
        f"{name}: is attended to, against the mask, in layer_03"
        for name in (
            "image to later image",
            "image to text after",
            "text before to image",
            "text to later text",
        )
    ]


def test_a_token_with_a_massive_output_hides_no_movement(checkpoints):
    """Trained LLMs have such tokens, mostly the first one."""
    mllm = probes.load(str(checkpoints["causal"]))

    def enlarge(_, args):
        states = args[0].clone()
        states[:, 0] *= 1e6
        return (states, *args[1:])

    mllm.layers[1].register_forward_pre_hook(enlarge)
    assert mllm.measured_mask().disagreements() == []
    leaking = with_mask(mllm, 3, torch.ones_like).measured_mask().disagreements()
    assert len(leaking) == 4 and all(line.endswith("in layer_03") for line in leaking)


@pytest.mark.parametrize(
    ("movement", "moved"),
    [
        ([0, 3e-7, 2e-6, 1e-2], [False, False, False, True]),  # rounding
        ([0, 1e-5, 1e-2, 0.9], [False, True, True, True]),  # a weak movement is one
        ([0, 1e-7, 2e-7, 4e-7], [False] * 4),
    ],
)
def test_the_threshold_lies_in_the_gap_between_rounding_and_movement(movement, moved):
    movement = torch.tensor([movement])
    assert (movement > measured_mask._threshold(movement)).tolist() == [moved]
