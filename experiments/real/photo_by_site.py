"""Draw what the probes of a run read in a photo, site by site, in one row: README's second picture.

    python -m experiments.real.photo_by_site RUN PHOTO OUT.png SITE ...

RUN is a finished run of `probes solve`. The classes that the maps show most have a colour each, all others are grey.
"""

import argparse

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

import probes

GREY = 7  # of the colour map
OPACITY = 0.55


def class_colours(maps: list[np.ndarray], classes: int) -> tuple[np.ndarray, list[int]]:
    """Return a colour for each class, f[K, 3], and the classes that are not grey, the most frequent one first."""
    colours = np.array([to_rgb(colour) for colour in colormaps["tab10"].colors])
    shares = np.zeros(classes)
    for labels in maps:
        pixels = np.bincount(labels.ravel(), minlength=classes)
        shares += pixels / labels.size
    most_frequent = np.argsort(-shares)[: len(colours) - 1].tolist()
    frequent = [index for index in most_frequent if shares[index] > 0]
    table = np.tile(colours[GREY], (classes, 1))
    table[frequent] = np.delete(colours, GREY, axis=0)[: len(frequent)]
    return table, frequent


def draw(photo: Image.Image, maps: dict[str, np.ndarray], classes: list[str]) -> Figure:
    """Return the photo beside its maps, and a legend."""
    colours, frequent = class_colours(list(maps.values()), len(classes))
    pictures = len(maps) + 1
    figure = Figure(figsize=(1.5 * pictures, 2.1), layout="constrained")
    axes = figure.subplots(1, pictures)
    axes[0].imshow(photo)
    axes[0].set_title("photo", fontsize=8)
    for axis, (site, labels) in zip(axes[1:], maps.items(), strict=True):
        axis.imshow(photo.convert("L"), cmap="gray")
        axis.imshow(colours[labels], alpha=OPACITY)
        axis.set_title(site.replace("_", " "), fontsize=8)
    for axis in axes:
        axis.axis("off")
    entries = [Patch(color=colours[index], label=classes[index]) for index in frequent]
    figure.legend(
        handles=entries, loc="outside lower center", ncols=len(entries), fontsize=7, frameon=False
    )
    return figure


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of a finished probe run")
    parser.add_argument("photo")
    parser.add_argument("out")
    parser.add_argument("sites", nargs="+", metavar="SITE")
    args = parser.parse_args()
    run = probes.ProbeRun(args.run)
    photo = Image.open(args.photo).convert("RGB")
    maps = {site: np.asarray(run.predict(photo, site=site)) for site in args.sites}
    draw(photo, maps, run.metrics["classes"]).savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
