"""Pictures of masks and of attention, read back from their pixels."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import probes
from probes.analyses import attention_pictures
from probes.cli import main

DRAWS_PICTURES = True


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Return a list of the figures that are saved."""
    figures = []
    save = Figure.savefig

    def keep(figure: Figure, *args, **options) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def panels(figure: Figure) -> list[np.ndarray]:
    return [np.array(ax.images[0].get_array()) for ax in figure.axes if ax.images]


def photo(folder):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 14, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder / "photo.png"


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_a_panel_of_the_mask_has_each_measured_pair(mask, checkpoints, drawn, tmp_path):
    main(["mask", str(checkpoints[mask]), "--png", str(tmp_path / "mask.png")])
    measured = probes.load(checkpoints[mask], dtype="float32").measured_mask()
    (panel,) = panels(drawn[0])
    assert np.array_equal(panel >= 2, measured.seen[0]), "all layers see the same, so in one panel"
    assert {*np.unique(panel)} == {0, 2}, "as claimed"
    assert Image.open(tmp_path / "mask.png").format == "PNG"


def test_layers_that_see_other_tokens_have_a_panel_and_a_colour_of_their_own(
    checkpoints, drawn, tmp_path
):
    measured = probes.load(checkpoints["causal"], dtype="float32").measured_mask()
    measured.seen[1, 0, -1] = True  # against the mask
    measured.seen[1, -1, 0] = False
    attention_pictures.draw_mask(measured, tmp_path / "mask.png")
    stock, other = panels(drawn[0])
    assert other[0, -1] == 3 and other[-1, 0] == 1
    assert (stock != other).sum() == 2


@pytest.mark.parametrize("patch", [None, (0, 1)])
def test_a_panel_of_each_layer_has_the_weights_of_the_patch(patch, checkpoints, drawn, tmp_path):
    words = [] if patch is None else ["--patch", *map(str, patch)]
    path = photo(tmp_path)
    out = tmp_path / "attention.png"
    main(["attention", str(checkpoints["bidirectional"]), str(path), "--out", str(out), *words])
    mllm = probes.load(checkpoints["bidirectional"])
    row, column = patch or (1, 1)
    weights = mllm.attention(mllm.preprocess(Image.open(path)))
    square, *maps = panels(drawn[0])
    assert square.shape == (mllm.geometry.image_px, mllm.geometry.image_px, 3)
    for panel, of_layer in zip(maps, weights.values(), strict=True):
        expected = of_layer[0].unflatten(0, mllm.grid)[row, column]
        assert torch.equal(torch.tensor(panel), expected.view(mllm.grid))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch", "2", "0"], "--patch 2 0: the grid has 2 rows and 2 columns"),
        (["--out", "there.png"], "there.png exists; --overwrite true replaces it"),
        (["--out", "a.jpg"], "a.jpg: expected a file name that ends in .png"),
    ],
)
def test_a_patch_outside_and_a_file_that_is_there_are_refused(
    words, message, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").touch()
    path = photo(tmp_path)
    command = ["attention", str(checkpoints["causal"]), str(path), "--out", "new.png", *words]
    with pytest.raises(SystemExit, match=message):
        main(command)
    assert not (tmp_path / "new.png").exists()
