"""`probes mask --png` and `probes attention`: which tokens attend to which, layer by layer, as a picture.

Shapes: L layers, T image tokens, N tokens, M that are measured.
"""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import atomic_write, check_new
from llava_bidir.common.images import read_photo
from probes.config import AttentionOptions
from probes.models.load import load
from probes.models.measured_mask import MeasuredMask

COLUMNS = 6  # of panels
PANEL = 2.2  # inches
SIZE = 7  # of text
PAIRS = {  # of tokens, by 2 * seen + (seen differs from what is claimed)
    "does not attend": "white",
    "does not attend, though the mask allows it": "#f0b6a8",
    "attends": "#0b5fc1",
    "attends against the mask": "#c1270b",
}


def run(options: AttentionOptions) -> None:
    """Run `probes attention`.

    Raises:
        UserError: The patch is not one of the model's, or FILE exists.
    """
    check_new(options.out, ".png", options.overwrite)
    photo = read_photo(options.photo)
    mllm = load(
        options.mllm, options.image_attention, image_px=options.image_px, trust=options.trust
    )
    rows, columns = mllm.grid
    row, column = options.patch or (rows // 2, columns // 2)
    if row >= rows or column >= columns:
        raise UserError(f"--patch {row} {column}: the grid has {rows} rows and {columns} columns")
    weights = mllm.attention(mllm.preprocess(photo))
    of_patch = {site: x[0, row * columns + column].view(mllm.grid) for site, x in weights.items()}
    draw_attention(mllm.geometry.place(photo), of_patch, patch=(row, column), file=options.out)
    print(options.out)


def draw_mask(measured: MeasuredMask, file: Path) -> None:
    """Write a picture of a measured mask: a panel for each group of layers whose tokens see the same ones."""
    panels: dict[bytes, list[int]] = {}
    for layer, seen in enumerate(measured.seen):
        panels.setdefault(seen.numpy().tobytes(), []).append(layer)
    figure, axes = _panels(len(panels))
    colours = ListedColormap([*PAIRS.values()])
    for ax, layers in zip(axes, panels.values(), strict=False):
        seen, claimed = measured.seen[layers[0]], measured.claimed[layers[0]]
        pairs = 2 * seen.int() + (seen != claimed)
        ax.imshow(pairs, cmap=colours, vmin=0, vmax=3, interpolation="nearest", aspect="auto")
        numbers = ", ".join(str(layer + 1) for layer in layers)
        ax.set_title(f"layers {numbers}", size=SIZE, wrap=True)
    image = measured.is_image.nonzero().flatten() + 1
    text = f"token attended to, of {len(measured.is_image)}; image: {image.min()} to {image.max()}"
    axes[0].set_xlabel(text, size=SIZE)
    axes[0].set_ylabel("token that attends", size=SIZE)
    for name, colour in PAIRS.items():
        axes[0].scatter([], [], marker="s", color=colour, edgecolors="black", lw=0.3, label=name)
    figure.legend(loc="outside lower center", fontsize=SIZE)
    _save(figure, file)


def draw_attention(
    square: Image.Image, weights: Mapping[str, Tensor], patch: tuple[int, int], file: Path
) -> None:
    """Write a picture of what a patch attends to: the model's square, and the weights f[h, w] at each layer."""
    figure, axes = _panels(1 + len(weights))
    rows, columns = next(iter(weights.values())).shape
    axes[0].imshow(square, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
    axes[0].set_title("input", size=SIZE)
    for ax, (site, of_site) in zip(axes[1:], weights.items(), strict=False):
        ax.imshow(of_site, cmap="Blues", vmin=0)
        ax.set_title(f"{site}: {of_site.sum():.0%}\nat most {of_site.max():.1%}", size=SIZE)
    for ax in axes[: 1 + len(weights)]:
        ax.plot(patch[1], patch[0], marker="s", mfc="none", mec="#c1270b")
    text = "attention of the patch in red: its share on the image, and the most on one patch"
    figure.supxlabel(text, size=SIZE)
    _save(figure, file)


def _panels(count: int) -> tuple[Figure, list]:
    """Return a figure with so many panels in view."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    size = (max(2 * PANEL, PANEL * columns), PANEL * rows + 1)
    figure = Figure(figsize=size, layout="constrained")
    axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes


def _save(figure: Figure, file: Path) -> None:
    with atomic_write(file) as partial:
        figure.savefig(partial, format="png", dpi=150)
