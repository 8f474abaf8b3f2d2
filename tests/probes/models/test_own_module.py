"""Any module as an encoder: its states, what is said of it, its controls, and files that build one."""

import sys
from pathlib import Path

import numpy as np
import own_modules
import pytest
import torch
from own_modules import EXTRA, MEAN, PATCH_PX, SIDE_PX, STD, WIDTH, Encoder
from PIL import Image
from torch import nn

import probes
from llava_bidir.common.errors import UserError
from probes.models import module_sources
from probes.models.module_sources import (
    absolute_source,
    check_trusted,
    source_identity,
    weights_digest,
)

SAID = {
    "preprocess": (MEAN, STD),
    "patch": PATCH_PX,
    "layers": "blocks",
    "norm": "norm",
    "parts": {"attn": "attn", "mlp": "mlp"},
    "image_px": SIDE_PX,
    "device": "cpu",
}


def photo(seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(256, size=(30, 40, 3), dtype=np.uint8))


def load(module: nn.Module | None = None, **changes) -> probes.FrozenEncoder:
    return probes.load(own_modules.build().module if module is None else module, **SAID | changes)


@torch.no_grad()
def test_states_are_those_of_the_modules_own_forward_without_extra_tokens():
    module = own_modules.build().module
    encoder = load(module)
    pixels = encoder.preprocess([photo(), photo(1)])
    torch.testing.assert_close(pixels[0], resized(photo()))
    states = encoder.states(pixels)
    hidden = module.eval().embed(pixels)
    assert encoder.grid == (4, 4) and encoder.widths == dict.fromkeys(encoder.sites, WIDTH)
    assert [*states] == ["layer_00", "layer_01", "layer_02", "layer_03", "final_norm"]
    torch.testing.assert_close(states["layer_00"], hidden[:, EXTRA:])
    for i, block in enumerate(module.blocks, 1):
        hidden = block(hidden)
        torch.testing.assert_close(states[f"layer_{i:02d}"], hidden[:, EXTRA:])
    torch.testing.assert_close(states["final_norm"], module.norm(hidden)[:, EXTRA:])


class ChannelsLast(nn.Module):
    """A layer whose states are a grid."""

    def forward(self, states):
        return states.flatten(1, -2).unflatten(1, (3, 6)).clone()


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
        (None, {"preprocess": ([123.0, 116.0, 103.0], [1.0, 1.0, 1.0])}, "divide both by 255"),
        (
            None,
            {"parts": {"attn": "norm1", "mlp": "mlp"}},
            "parts of blocks.0 do not add up .* LayerScale .*ls1",
        ),
        (Encoder(extra_last=True), {}, "2 other tokens, then patches of 8 px in raster order"),
        (
            Encoder(ChannelsLast),
            {"parts": None},
            r"are \[2, 3, 6, 16\]; expected \[2, tokens, width\]",
        ),
        (Skipping(), {}, "does not read what blocks.0 wrote"),
        (None, {"layers": ["blocks.1", "blocks.2"]}, "blocks.0, of the .* class, runs too. Name"),
        (None, {"layers": ["blocks.0", "blocks.1"]}, "blocks.2, of the .* class, runs too. Name"),
    ],
)
def test_a_description_that_does_not_fit_is_an_error(module, changes, message):
    with pytest.raises(UserError, match=message):
        load(module, **changes)


class Scale(nn.Module):
    """LayerScale as a module: a factor for each channel."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.1, 0.9, WIDTH))

    def forward(self, states):
        return self.gamma * states


class ScaledBlock(own_modules.Block):
    """A layer that scales attention and MLP before it adds them."""

    def __init__(self):
        super().__init__()
        self.ls1, self.ls2 = Scale(), Scale()

    def forward(self, states):
        normed = self.norm1(states)
        states = states + self.ls1(self.attn(normed, normed, normed)[0])
        return states + self.ls2(self.mlp(self.norm2(states)))


def test_with_layer_scale_the_parts_are_the_scales_and_the_error_says_so():
    torch.manual_seed(0)
    module = Encoder(ScaledBlock)
    with pytest.raises(UserError) as error:
        load(module)
    said = "parts={'attn': 'ls1', 'mlp': 'ls2'}"
    assert said in str(error.value)
    encoder = load(module, parts={"attn": "ls1", "mlp": "ls2"})
    states = encoder.states(encoder.preprocess(photo()), "all_parts")
    added = states["attn_02"] + states["mlp_02"]
    torch.testing.assert_close(states["layer_01"] + added, states["layer_02"])
    load(module, parts={"attn": "ls1", "mlp": "ls2"}, untrained=["encoder"], match="permuted")


def test_what_a_function_returns_instead_is_named_with_all_that_is_expected(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Linear(1, 1)"
    )
    with pytest.raises(UserError) as error:
        probes.load(f"{tmp_path}/mine.py:build")
    for field in ("a Linear", "preprocess=", "patch=14", "layers=", "parts=", "image_px=", "ls1"):
        assert field in str(error.value)


# ------------------------------------------------------------------------------------------- preprocessing
def resized(image: Image.Image) -> torch.Tensor:
    """Resize a photo to a square, and normalise."""
    square = image.resize((SIDE_PX, SIDE_PX), Image.BICUBIC)
    return torch.from_numpy((np.asarray(square) / 255 - MEAN) / STD).movedim(-1, 0).float()


def test_of_a_function_side_and_normalisation_are_read_on_squares():
    encoder = load(preprocess=resized, image_px=None)
    torch.testing.assert_close(
        encoder.preprocess(photo()), resized(photo())[None], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "preprocess",
    [
        lambda image: resized(image.resize((36, 36)).crop((2, 2, 34, 34))),
        lambda image: resized(image).flip(-1),
        lambda image: resized(image).square(),
    ],
)
def test_a_function_that_does_more_to_a_square_is_refused(preprocess):
    """A crop would place masks beside their pixels."""
    with pytest.raises(UserError, match="does more to a square of 32 px"):
        load(preprocess=preprocess)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (
            lambda image: torch.zeros(3, SIDE_PX, SIDE_PX),
            "shift and scale each channel, or ignores it",
        ),
        (
            lambda image: resized(image)[None],
            r"returned a Tensor, shape .*\[1, 3, 32, 32\].*; expected a tensor f",
        ),
        (
            lambda image: resized(image).numpy(),
            r"returned a ndarray, shape \(3, 32, 32\); expected",
        ),
        (lambda image: image, "returned a Image, .*; expected"),
    ],
)
@pytest.mark.parametrize("image_px", [None, SIDE_PX])
def test_a_function_that_does_not_return_the_images_pixels_is_refused(
    preprocess, message, image_px
):
    with pytest.raises(UserError, match=message):
        load(preprocess=preprocess, image_px=image_px)


# ------------------------------------------------------------------------------------------------ controls
def test_permuted_layers_keep_their_weights_in_another_order_and_the_module_its_own():
    module = own_modules.build().module.train()
    before = [parameter.clone() for parameter in module.parameters()]
    permuted = load(module, untrained=["encoder"], match="permuted")
    assert module.training and all(p.requires_grad for p in module.parameters())
    assert all(map(torch.equal, before, module.parameters()))
    assert not torch.equal(permuted.layers[0].mlp[0].weight, module.blocks[0].mlp[0].weight)
    states, trained = (frozen.states(frozen.preprocess(photo())) for frozen in (permuted, load()))
    assert torch.equal(states["layer_00"], trained["layer_00"])
    assert not torch.allclose(states["layer_01"], trained["layer_01"], atol=1e-2)


def test_without_attention_and_mlp_layers_are_permuted_only():
    module = own_modules.build_closed().module
    encoder = load(module, untrained=["encoder"], match="permuted", parts=None)
    assert not torch.equal(encoder.layers[0].linear1.weight, module.blocks[0].linear1.weight)
    control = {"untrained": ["encoder"], "match": "update", "match_images": [photo()]}
    with pytest.raises(UserError, match="matched .* this module does not say its `parts`"):
        load(module, parts=None, **control)


def test_parts_add_up_to_the_layers_and_what_is_not_known_is_refused():
    encoder = load()
    pixels = encoder.preprocess(photo())
    states = encoder.states(pixels, "all_parts")
    for layer in (1, 2, 3):
        added = states[f"attn_{layer:02d}"] + states[f"mlp_{layer:02d}"]
        torch.testing.assert_close(
            states[f"layer_{layer - 1:02d}"] + added, states[f"layer_{layer:02d}"]
        )
    with pytest.raises(UserError, match="does not say its `parts` .* leave out attn_02"):
        load(parts=None).states(pixels, ["attn_02"])
    with pytest.raises(UserError, match="attention .* of a module of your own is not known"):
        encoder.states(pixels, knockout=probes.Knockout(torch.arange(16)[None] == 3))


# --------------------------------------------------------------------------------------- a file and a function
WEIGHTS = """
def build():
    encoder = own_modules.build()
    encoder.module.blocks[1].mlp[0].bias.data += {offset}
    return encoder
"""


def write(folder: Path, offset: float = 0.0) -> str:
    file = folder / "mine.py"
    file.write_text("import own_modules\n" + WEIGHTS.format(offset=offset))
    return f"{file}:build"


def test_the_identity_is_that_of_file_and_weights(tmp_path):
    first = source_identity(write(tmp_path))
    (tmp_path / "other").mkdir()
    assert source_identity(write(tmp_path / "other")) == first
    assert source_identity(write(tmp_path, offset=1.0)) != first
    module = own_modules.build().module
    before = weights_digest(module)
    module.norm.bias.data[0] += 1
    assert weights_digest(module) != before
    assert source_identity("facebook/dinov2-small") == "facebook/dinov2-small"


def test_what_the_file_imports_is_part_of_the_identity(tmp_path, monkeypatch):
    """Of its folder, also by way of other files; a process imports each once."""
    package = tmp_path / "gains"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "read.py").write_text("from .constants import GAIN\n")
    path = write(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(
        "try:\n    from . import gains\nexcept ImportError:\n    from gains.read import GAIN\n"
        + file.read_text()
    )
    identities = []
    for gain in (1, 10):
        (package / "constants.py").write_text(f"GAIN = {gain}\n")
        for name in ("gains", "gains.read", "gains.constants"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        module_sources._describe.cache_clear()
        identities.append(source_identity(path))
    assert identities[0].keys() >= {"import gains", "import gains.read", "import own_modules"}
    changed = {key for key, value in identities[0].items() if identities[1][key] != value}
    assert changed == {"import gains.constants"}


def test_a_file_that_a_run_names_is_run_only_if_it_is_trusted(tmp_path, monkeypatch):
    """Or if this process has been asked for it by its name; tests/probes/studies/test_module_study.py has `--trust`."""
    path = write(tmp_path)
    with pytest.raises(UserError, match="a file with code. Read it, then allow it: --trust true"):
        check_trusted(path, tmp_path)
    probes.load(path, device="cpu")
    monkeypatch.chdir(tmp_path)
    assert absolute_source("mine.py:build") == path
    check_trusted("mine.py:build", tmp_path)
    write(tmp_path, offset=2.0)
    with pytest.raises(UserError, match="a file with code"):
        check_trusted(path, tmp_path)
