"""The command `probes segment`: predict the maps of any photos with the probe of a site.

OUT/NAME.png             class index of each pixel, a palette PNG; of 16 bits for more than 255 classes
OUT/NAME_overlay.png     the map on top of the photo
OUT/legend.png           colours, names and pixel shares of the classes that occur
OUT/legend.json          the same for all classes, with run, site and photos
"""

import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import exclusive_run_lock, read_json, write_files
from llava_bidir.common.images import read_photo
from probes.config import SegmentOptions
from probes.data.image_dataset import open_png, palette_of
from probes.runs.read import ProbeRun
from probes.tasks.segmentation import colorize_classes

COMMAND = "probes segment"  # marks the files of this command, which it may replace
OPACITY = 0.5
ROW_PX = 20
MOST_COLOURS = 256  # of a palette


def run(options: SegmentOptions) -> None:
    """Run `probes segment`."""
    photos = options.photos
    run = ProbeRun(options.probes, trust=options.trust)
    run.check_classes()
    out = options.out
    site = run.check_site(options.site)
    _check_paths(photos, out)
    with exclusive_run_lock(out, "legend.json"):
        files, shares = segment(run, photos=photos, site=site, out=out)
        write_files(files)
    named = zip(shares, run.metrics["classes"], strict=True)
    largest = sorted(named, key=lambda pair: -pair[0])[:3]
    text = ", ".join(f"{name} {share:.0%}" for share, name in largest if share)
    print(
        f"{out}: maps of {len(photos)} photos at {site} ({text}); colours in {out / 'legend.png'}"
    )


def _check_paths(photos: Sequence[Path], out: Path) -> None:
    """Raise unless all photos exist and no output overwrites another one or a file of somebody else."""
    if missing := [photo for photo in photos if not photo.is_file()]:
        raise UserError(f"{missing[0]} is not a file; expected a photo")
    outputs = [out / "legend.png", out / "legend.json"]
    for photo in photos:
        outputs += _output_paths(photo, out)
    if duplicates := [path for path in outputs if outputs.count(path) > 1]:
        raise UserError(
            f"two outputs would be {duplicates[0]}; rename a photo or run the command once for each"
        )
    for path in outputs:
        if path.exists() and not _is_own_file(path):
            raise UserError(
                f"{path} exists and was not written by `{COMMAND}`; choose another --out"
            )


def _output_paths(photo: Path, out: Path) -> tuple[Path, Path]:
    return out / f"{photo.stem}.png", out / f"{photo.stem}_overlay.png"


def _is_own_file(path: Path) -> bool:
    try:
        marks = read_json(path) if path.suffix == ".json" else open_png(path).info
    except UserError:
        return False
    return COMMAND in (marks.get("command"), marks.get("Software"))


def segment(
    run: ProbeRun, photos: Sequence[Path], site: str, out: Path
) -> tuple[dict[Path, bytes | dict], list[float]]:
    """Return the contents of all files by path, and the share of pixels of each class."""
    classes = run.metrics["classes"]
    palette = _palette(run)
    pixels = np.zeros(len(classes), np.int64)
    files = {}
    for photo in tqdm(photos, desc="photos"):
        image = read_photo(photo)
        prediction = run.predict(image, site)
        pixels += np.bincount(prediction.ravel(), minlength=len(classes))
        indices = Image.fromarray(prediction)
        if len(palette) <= MOST_COLOURS:
            indices = indices.convert("P")
            indices.putpalette(palette.tobytes())
        overlay = Image.blend(
            image, Image.fromarray(colorize_classes(prediction, palette)), OPACITY
        )
        index_file, overlay_file = _output_paths(photo, out)
        files |= {index_file: _encode_png(indices), overlay_file: _encode_png(overlay)}
    shares = (pixels / pixels.sum()).tolist()
    legend = [
        {"index": k, "class": name, "colour": palette[k].tolist(), "share": shares[k]}
        for k, name in enumerate(classes)
    ]
    files[out / "legend.png"] = _encode_png(
        _draw_legend([row for row in legend if row["share"] > 0])
    )
    files[out / "legend.json"] = {
        "command": COMMAND,
        "runs": [run.fingerprint],
        "image_attention": run.mask,
        "site": site,
        "photos": [str(photo) for photo in photos],
        "classes": legend,
    }
    return files, shares


def _palette(run: ProbeRun) -> np.ndarray:
    try:
        return palette_of(run.dataset())
    except UserError:  # the dataset may be on another machine
        return palette_of(SimpleNamespace(classes=run.metrics["classes"]))


def _draw_legend(rows: list[dict]) -> Image.Image:
    rows = sorted(rows, key=lambda row: -row["share"])
    texts = [f"{row['share']:6.1%}  {row['class']}" for row in rows]
    font = ImageFont.load_default()
    width = 2 * ROW_PX + max(int(font.getlength(text)) for text in texts)
    legend = Image.new("RGB", (width, ROW_PX * len(rows)), "white")
    draw = ImageDraw.Draw(legend)
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        draw.rectangle(
            (4, i * ROW_PX + 3, ROW_PX, (i + 1) * ROW_PX - 4),
            fill=tuple(row["colour"]),
            outline="black",
        )
        draw.text((ROW_PX + 8, i * ROW_PX + 4), text, fill="black", font=font)
    return legend


def _encode_png(image: Image.Image) -> bytes:
    mark = PngImagePlugin.PngInfo()
    stream = io.BytesIO()
    mark.add_text("Software", COMMAND)
    image.save(stream, "PNG", pnginfo=mark)
    return stream.getvalue()
