"""The measured mask, against definitions in loops, on every family, and on models whose mask is broken."""

from functools import partial

import pytest
import reference
import torch
from tiny_families import STOCK

import probes
from llava_bidir import IMAGE_ATTENTION
from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.models import measured_mask
from probes.models.families import dynamic_resolution
from probes.models.hooks import around, with_arguments

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("small_squares")]


def assert_is(measured, allowed) -> None:
    """Compare all pairs of two tokens with a definition of query and key, by a loop."""
    pairs = {name: [] for name in measured_mask.DIRECTIONS}
    is_image = measured.is_image.tolist()
    for layer in measured.seen.tolist():
        for query, row in zip(measured.tokens.tolist(), layer, strict=True):
            for key, seen in enumerate(row):
                if key != query:
                    assert seen == allowed(is_image, query, key), (query, key)
                    if is_image[query] and is_image[key]:
                        order = "earlier" if key < query else "later"
                        pairs[f"image to {order} image"].append(seen)
    (directions,) = measured.directions().values()
    shares = {direction.name: direction.measured for direction in directions}
    for name in ("image to earlier image", "image to later image"):
        assert shares[name] == pytest.approx(sum(pairs[name]) / len(pairs[name]))
    assert measured.disagreements() == []


@pytest.mark.parametrize("name", ["causal", "bidirectional", "prefix"])
@pytest.mark.parametrize("applied", [None, "causal", "bidirectional"])
def test_equals_the_definition_of_the_mask(checkpoints, name, applied):
    """Of the model's own forward, and of the one in which `probes` replaces the mask."""
    measured = probes.load(checkpoints[name], applied).measured_mask()
    assert_is(measured, partial(reference.allowed, applied or name))


@pytest.fixture
def of_sixteen(checkpoint, monkeypatch):
    """Return a function that loads a model of 4 x 4 image tokens under a mask, also within its rows or columns."""
    monkeypatch.setattr(dynamic_resolution, "TOKENS_PER_SIDE", 4)
    for name, number_of in {"rows": lambda i: i // 4, "columns": lambda i: i % 4}.items():
        monkeypatch.setitem(IMAGE_ATTENTION, name, partial(blocks, number_of))
    return lambda name: probes.load(checkpoint("qwen2_vl"), name, device="cpu")


def blocks(number_of, is_image):
    return torch.where(is_image, number_of(is_image.cumsum(-1) - 1), -1)


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_a_registered_mask_is_measured_pair_by_pair(name, of_sixteen):
    def allowed(is_image, query, key):
        first = is_image.index(True)
        cells = [divmod(token - first, 4) for token in (query, key)]
        is_same = len({cell[name == "columns"] for cell in cells}) == 1
        return query >= key or (is_image[query] and is_image[key] and is_same)

    measured = of_sixteen(name).measured_mask()
    assert_is(measured, allowed)
    assert "image to later image      20%       20%" in str(measured)


def test_of_a_large_image_some_tokens_are_measured(of_sixteen, monkeypatch):
    monkeypatch.setattr(measured_mask, "MOST_IMAGE_TOKENS", 5)
    measured = of_sixteen("bidirectional").measured_mask()
    assert measured.is_image[measured.tokens].sum() == 5
    assert_is(measured, partial(reference.allowed, "bidirectional"))


@pytest.mark.parametrize("name", sorted(STOCK))
def test_every_family_attends_as_it_claims(name, load_family):
    measured = load_family(name).measured_mask()
    assert measured.disagreements() == []
    assert measured.seen.any(2).any(1).all(), "each layer mixes tokens"
    if set(measured.kinds) == {"full_attention"}:
        assert_is(measured, partial(reference.allowed, measured.image_attention))


def with_mask(mllm, layer: int, change):
    """Replace the mask that reaches one layer, 1..L, by what `change` makes of bool[1, 1, N, N]."""

    def replaced(arguments):
        mask = arguments["attention_mask"]
        if mask is None:  # sdpa's is_causal
            tokens = mllm.ids.shape[1] + measured_mask.TEXT_AFTER
            mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
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


def test_a_pair_that_a_layer_adds_is_named(of_sixteen):
    """Also of neighbours."""

    def open_one(mask):
        changed = mask.clone()
        changed[..., -10, -9] = True  # the last but one of the image, and the last
        return changed

    mllm = with_mask(of_sixteen("causal"), 2, open_one)
    expected = "image to later image: is attended to, against the mask, in layer_02"
    assert mllm.measured_mask().disagreements() == [expected]


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
