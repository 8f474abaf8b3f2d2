"""Any module as an encoder: its states, what is measured of it, and its controls."""

import numpy as np
import own_modules
import pytest
import torch
from own_modules import EXTRA, MEAN, PATCH_PX, SIDE_PX, STD, WIDTH, Encoder
from PIL import Image
from torch import nn

import probes
from llava_bidir.common.errors import UserError

SAID = {
    "preprocess": (MEAN, STD),
    "patch": PATCH_PX,
    "layers": "blocks",
    "norm": "norm",
    "image_px": SIDE_PX,
    "device": "cpu",
}


def photo(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise)


def load(module: nn.Module | None = None, **changes) -> probes.FrozenEncoder:
    return probes.load(own_modules.build().module if module is None else module, **SAID | changes)


@torch.no_grad()
def test_states_are_those_of_the_modules_own_forward_without_extra_tokens():
    module = own_modules.build().module
    encoder = load(module)
    pixels = encoder.preprocess([photo(), photo(seed=1)])
    square = np.asarray(photo().resize((SIDE_PX, SIDE_PX), Image.BICUBIC)) / 255
    expected = torch.from_numpy((square - MEAN) / STD).movedim(-1, 0).float()
    torch.testing.assert_close(pixels[0], expected)
    states = encoder.states(pixels)
    hidden = module.eval().embed(pixels)
    assert encoder.grid == (4, 4) and encoder.widths == dict.fromkeys(encoder.sites, WIDTH)
    assert [*states] == ["layer_00", "layer_01", "layer_02", "layer_03", "final_norm"]
    torch.testing.assert_close(states["layer_00"], hidden[:, EXTRA:])
    for i, block in enumerate(module.blocks, 1):
        hidden = block(hidden)
        torch.testing.assert_close(states[f"layer_{i:02d}"], hidden[:, EXTRA:])
    torch.testing.assert_close(states["final_norm"], module.norm(hidden)[:, EXTRA:])


def test_the_module_itself_stays_as_it_is():
    module = own_modules.build().module.train()
    before = [parameter.clone() for parameter in module.parameters()]
    encoder = load(module, untrained=["encoder"], match="permuted")
    assert module.training and all(p.requires_grad for p in module.parameters())
    assert all(map(torch.equal, before, module.parameters()))
    assert not torch.equal(encoder.layers[0].mlp[0].weight, module.blocks[0].mlp[0].weight)


class Noisy(Encoder):
    """Its states differ from forward to forward, also in eval mode."""

    def forward(self, pixels):
        return super().forward(nn.functional.dropout(pixels, 0.3, training=True))


class ChannelsLast(nn.Module):
    """A layer whose states are a grid."""

    def forward(self, states):
        return states.unflatten(1, (3, 6)).clone()


class Skipping(Encoder):
    """Its second block reads what the first one wrote, doubled."""

    def forward(self, pixels):
        states = self.embed(pixels)
        for block in self.blocks:
            states = 2 * block(states)
        return states


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (None, {"patch": 16}, "changes token .* expected token"),
        (None, {"patch": 4}, "reads 18 tokens, and the input has 8 x 8 patches"),
        (None, {"layers": ["blocks.0", "blocks.2"]}, "does not read what blocks.0 wrote"),
        (None, {"layers": ["blocks.1", "blocks.0"]}, "does not read what blocks.1 wrote"),
        (Noisy(), {}, "on the same pixels differ in eval mode"),
        (None, {"preprocess": ([123.0, 116.0, 103.0], [1.0, 1.0, 1.0])}, "divide both by 255"),
        (None, {"norm": "stem"}, "norm stem"),
        (Encoder(extra_last=True), {}, "2 other tokens, then patches of 8 px in raster order"),
        (Encoder(ChannelsLast), {}, r"are \[2, 3, 6, 16\]; expected \[2, tokens, width\]"),
        (Skipping(), {}, "does not read what blocks.0 wrote"),
    ],
)
def test_a_description_that_does_not_fit_is_an_error(module, changes, message):
    with pytest.raises(UserError, match=message):
        load(module, **changes)


# ------------------------------------------------------------------------------------ layers that are not read
class Stepwise(Encoder):
    """Its positions are 12 x 12; it attends once before its blocks, and adds once after them, without modules."""

    def __init__(self, before: bool = False, after: bool = False):
        super().__init__()
        self.before, self.after = before, after
        self.positions = nn.Parameter(torch.randn(1, 144, WIDTH))

    def forward(self, pixels):
        states = self.embed(pixels)
        if self.before:
            weights = (states @ states.transpose(1, 2)).softmax(-1)
            states = states + weights @ states
        for block in self.blocks:
            states = block(states)
        if self.after:
            states = states + states.relu()
        return self.norm(states)[:, 0]


class Pooled(Encoder):
    """Its norm reads the mean of the patches."""

    def forward(self, pixels):
        states = self.embed(pixels)
        for block in self.blocks:
            states = block(states)
        return self.norm(states[:, EXTRA:].mean(1))


LARGE = {"image_px": 12 * PATCH_PX}


@pytest.mark.parametrize(
    ("module", "changes", "said"),
    [
        (None, {}, []),
        (Stepwise(), LARGE, []),
        (Pooled(), {}, []),
        (None, {"layers": ["blocks.1", "blocks.2"]}, ["blocks.0, of the same class"]),
        (None, {"layers": ["blocks.0"], "norm": None}, ["blocks.1, blocks.2, of the same class"]),
        (
            None,
            {"layers": ["blocks.0"]},
            ["blocks.1, blocks.2, of the same class", "is not what blocks.0 wrote"],
        ),
        (Stepwise(before=True), LARGE, ["something before it mixes patches"]),
        (Stepwise(after=True), LARGE, ["what norm reads in a forward is not what blocks.2 wrote"]),
    ],
)
def test_what_runs_before_or_after_the_named_layers_is_said(module, changes, said):
    notes = load(module, **changes).unread_notes
    assert len(notes) == len(said), notes
    for note, text in zip(notes, said, strict=True):
        assert text in note


# ------------------------------------------------------------------------------------------- preprocessing
def cropping(image: Image.Image) -> torch.Tensor:
    """Resize the shorter side to 36 px, keep the middle, and normalise."""
    scale = 36 / min(image.size)
    image = image.resize([int(length * scale) for length in image.size], Image.BILINEAR)
    left, top = ((length - SIDE_PX) // 2 for length in image.size)
    image = image.crop((left, top, left + SIDE_PX, top + SIDE_PX))
    pixels = (np.asarray(image) / 255 - MEAN) / STD
    return torch.from_numpy(pixels).movedim(-1, 0).float()


def test_normalisation_side_and_crop_of_a_function_are_measured():
    encoder = load(preprocess=cropping, image_px=None)
    rule = encoder.geometry.rule
    assert (rule.way, rule.resample, rule.before_crop * SIDE_PX) == (
        "center_crop",
        Image.BILINEAR,
        36,
    )
    for size in ((40, 30), (50, 80)):
        torch.testing.assert_close(
            encoder.preprocess(photo(size)),
            cropping(photo(size))[None],
            atol=1e-5,
            rtol=0,
        )


def normalised(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy((np.asarray(image) / 255 - MEAN) / STD).movedim(-1, 0).float()


def padded(colour: tuple[int, int, int]):
    """Centre the photo on a square of a colour, then resize."""

    def preprocess(image):
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), colour)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return normalised(canvas.resize((SIDE_PX, SIDE_PX), Image.BICUBIC))

    return preprocess


def letterboxed(image: Image.Image) -> torch.Tensor:
    """Resize the longer side, normalise, and pad with 0, which is the mean colour."""
    size = [max(round(length * SIDE_PX / max(image.size)), 1) for length in image.size]
    square = torch.zeros(3, SIDE_PX, SIDE_PX)
    left, top = ((SIDE_PX - length) // 2 for length in size)
    square[:, top : top + size[1], left : left + size[0]] = normalised(
        image.resize(size, Image.BILINEAR)
    )
    return square


@pytest.mark.parametrize(
    ("preprocess", "way", "colour"),
    [
        (padded((0, 0, 0)), "pad", (0, 0, 0)),
        (padded((200, 90, 30)), "pad", (200, 90, 30)),
        (letterboxed, "letterbox", tuple(255 * x for x in MEAN)),
    ],
)
def test_a_padding_and_its_colour_are_measured(preprocess, way, colour):
    encoder = load(preprocess=preprocess, image_px=None)
    assert encoder.geometry.resize == way
    assert encoder.geometry.padding == pytest.approx(colour, abs=1)
    assert "padded with the colour" in repr(encoder)
    for size in ((40, 30), (50, 80), (32, 32)):
        torch.testing.assert_close(
            encoder.preprocess(photo(size))[0],
            preprocess(photo(size)),
            atol=1 / 255 / min(STD),
            rtol=0,
        )


def test_a_way_to_make_squares_that_is_not_known_must_be_replaced():
    def mirrored(image):
        return cropping(image).flip(-1)

    with pytest.raises(UserError, match="columns 76 to 20 of .*image_resize='squash'"):
        load(preprocess=mirrored, image_px=None)
    encoder = load(preprocess=mirrored, image_px=None, image_resize="squash")
    torch.testing.assert_close(encoder.preprocess(photo()), load().preprocess(photo()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pixels: pixels.flip(0), "expected each channel shifted and scaled"),
        (lambda pixels: -pixels, "expected more for white"),
    ],
)
def test_a_function_that_changes_more_than_the_scale_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        load(preprocess=lambda image: change(cropping(image)))


# ------------------------------------------------------------------------------------------------ controls
def test_permuted_layers_keep_their_weights_in_another_order():
    encoder = load()
    permuted = load(untrained=["encoder"], match="permuted")
    pixels = encoder.preprocess(photo())
    pairs = zip(encoder.layers.parameters(), permuted.layers.parameters(), strict=True)
    for before, after in pairs:
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
    states, trained = (frozen.states(pixels) for frozen in (permuted, encoder))
    assert torch.equal(states["layer_00"], trained["layer_00"])
    assert not torch.allclose(states["layer_01"], trained["layer_01"], atol=1e-2)


def test_without_attention_and_mlp_layers_are_permuted_only():
    module = own_modules.build_closed().module
    encoder = load(module, untrained=["encoder"], match="permuted")
    assert not torch.equal(encoder.layers[0].linear1.weight, module.blocks[0].linear1.weight)
    with pytest.raises(UserError, match="blocks.0, a TransformerEncoderLayer, has no attention"):
        load(module, untrained=["encoder"], match="update", match_images=[photo()])


def test_parts_add_up_to_the_layers_and_what_is_not_known_is_refused():
    encoder = load()
    pixels = encoder.preprocess(photo())
    states = encoder.states(pixels, "all_parts")
    for layer in (1, 2, 3):
        added = states[f"attn_{layer:02d}"] + states[f"mlp_{layer:02d}"]
        torch.testing.assert_close(
            states[f"layer_{layer - 1:02d}"] + added,
            states[f"layer_{layer:02d}"],
        )
    with pytest.raises(UserError, match="no attention and MLP .* leave out attn_02"):
        load(own_modules.build_closed().module).states(pixels, ["attn_02"])
    with pytest.raises(UserError, match="attention .* of a module of your own is not known"):
        encoder.states(pixels, knockout=probes.Knockout(torch.arange(16)[None] == 3))
