"""`probes segment` on any photo, against an independent forward and F.interpolate."""

import json
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import torch.nn.functional as F
from PIL import Image, ImageOps

from probes.cli import main
from probes.data.image_dataset import palette_of
from probes.runs.read import ProbeRun


@pytest.fixture(scope="module")
def runs(checkpoints, segmentation, tmp_path_factory) -> dict[str, ProbeRun]:
    """Runs on images that are squashed and padded."""
    made = {}
    for resize in ("squash", "pad"):
        out = tmp_path_factory.mktemp(resize)
        more = ["--model.image_resize", resize, "--model.learning_rate", "0.3"]
        made[resize] = probe_runs.fit(checkpoints["bidirectional"], segmentation, out, *more)
    return made


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """Photos of several modes, which their EXIF tags turn, as viewers show them."""
    noise = np.random.default_rng(0).integers(0, 256, (111, 159, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {"odd.jpg": noise[..., :3], "grey.png": noise[:33, :, 0], "rgba.png": noise[:, :27]}
    for name, array in pictures.items():
        Image.fromarray(array).save(tmp_path / name, exif=exif)
    return [tmp_path / name for name in pictures]


def upright(photo: Path) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(photo)).convert("RGB")


def expected_map(run: ProbeRun, image: Image.Image, site: str) -> np.ndarray:
    """Own forward; under "pad" the map of the padded square is cropped to the photo."""
    mllm = run.mllm()
    states = mllm.states(mllm.preprocess([image]), [site])[site]
    logits = run.probes()[site](states).transpose(1, 2).unflatten(-1, mllm.grid)
    size = np.array(image.size[::-1])
    side = np.full(2, size.max()) if mllm.geometry.resize == "pad" else size
    classes = F.interpolate(logits, tuple(side), mode="bilinear")[0].argmax(0).numpy()
    top, left = (side - size) // 2
    return classes[top : top + size[0], left : left + size[1]]


def segment(run, photos, out, *more: str) -> None:
    main(["segment", "--probes", str(run.path), *map(str, photos), "--out", str(out), *more])


@pytest.mark.parametrize(("resize", "site"), [("squash", None), ("pad", "adapter")])
def test_maps_equal_an_own_forward_and_overlay_and_legend_match_them(
    resize, site, runs, photos, tmp_path
):
    run = runs[resize]
    out = tmp_path / "out"
    segment(run, photos, out, *([] if site is None else ["--site", site]))
    site = site or run.metrics["summary"]["peak_site"]
    palette = palette_of(run.dataset())
    maps = []
    for photo in photos:
        written, overlay = (Image.open(out / f"{photo.stem}{x}.png") for x in ("", "_overlay"))
        assert written.getpalette()[:9] == palette.ravel().tolist()
        class_map = np.asarray(written)
        assert (class_map == expected_map(run, upright(photo), site)).mean() > 0.999, "up to ties"
        assert (run.predict(Image.open(photo), site) == class_map).all()
        colours = np.asarray(written.convert("RGB"))  # as Pillow reads the palette
        blend = (np.asarray(upright(photo)).astype(int) + colours) / 2
        assert np.abs(np.asarray(overlay) - blend).max() <= 1
        maps.append(class_map.ravel())
    legend = json.loads((out / "legend.json").read_text())
    assert legend["site"] == site
    pixels = np.bincount(np.concatenate(maps), minlength=3)
    for k, row in enumerate(legend["classes"]):
        assert (row["class"], row["colour"]) == (run.metrics["classes"][k], palette[k].tolist())
        assert row["share"] == pytest.approx(pixels[k] / pixels.sum())
    assert Image.open(out / "legend.png").height == 20 * (pixels > 0).sum()


def test_own_files_are_replaced_and_others_are_not(runs, photos, tmp_path):
    """The run can stand first, as in `probes study MODEL DATA`."""
    run = runs["squash"]
    segment(run, photos[:1], tmp_path / "out")
    main(["segment", str(run.path), *map(str, photos), "--out", str(tmp_path / "out")])
    with pytest.raises(
        SystemExit, match=r"grey.png exists and was not written by `probes segment`; choose another"
    ):
        segment(run, photos, photos[0].parent)
