"""`probes mask --png` and `probes attention`: which tokens attend to which, layer by layer, as a picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import atomic_write, check_new
from llava_bidir.common.images import read_photo
from probes.config import AttentionOptions
from probes.models.load import load
from probes.models.measured_mask import MeasuredMask

COLUMNS = 6  # of panels
PANEL = 2.2  # inches
TEXT = {"axes.titlesize": 7, "figure.labelsize": 7}
# of pairs of tokens, by 2 * seen + (seen differs from what is claimed)
COLOURS = ListedColormap(["white", "#f0b6a8", "#0b5fc1", "#c1270b"])
LEGEND = "rows attend to columns; blue: yes; red: against the mask;\npale red: no, though the mask allows it"


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
    caption = "attention of the patch in red: its share on the image, and the most on one patch"
    with panels(1 + len(weights), caption, options.out) as axes:
        square = mllm.geometry.place(photo)
        axes[0].imshow(square, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
        for ax, (site, of_site) in zip(axes[1:], weights.items(), strict=False):
            of_patch = of_site[0, row * columns + column].view(mllm.grid)
            ax.imshow(of_patch, cmap="Blues", vmin=0)
            ax.set_title(f"{site}: {of_patch.sum():.0%}\nat most {of_patch.max():.1%}")
        for ax in axes:
            ax.plot(column, row, marker="s", mfc="none", mec="#c1270b")
    print(options.out)


def draw_mask(measured: MeasuredMask, file: Path) -> None:
    """Write a picture of a measured mask: a panel for each group of layers whose tokens see the same ones."""
    groups: dict[bytes, list[int]] = {}
    for layer, seen in enumerate(measured.seen):
        groups.setdefault(seen.numpy().tobytes(), []).append(layer)
    image = measured.is_image.nonzero().flatten() + 1
    caption = f"{LEGEND}\ntokens {image.min()} to {image.max()} are the image's"
    with panels(len(groups), caption, file) as axes:
        for ax, layers in zip(axes, groups.values(), strict=False):
            seen = measured.seen[layers[0]]
            pairs = 2 * seen.int() + (seen != measured.claimed[layers[0]])
            ax.imshow(pairs, cmap=COLOURS, vmin=0, vmax=3, interpolation="nearest", aspect="auto")
            numbers = ", ".join(str(layer + 1) for layer in layers)
            ax.set_title(f"layers {numbers}", wrap=True)


@contextmanager
def panels(count: int, caption: str, file: Path) -> Iterator[list[mpl.axes.Axes]]:
    """Yield so many panels, or a few more for full rows, and write their picture to a file when the block ends."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    size = (max(2 * PANEL, PANEL * columns), PANEL * rows + 1)
    with mpl.rc_context(TEXT), atomic_write(file) as partial:
        figure = Figure(figsize=size, layout="constrained")
        axes = [*figure.subplots(rows, columns, squeeze=False).flat]
        for ax in axes:
            ax.set(xticks=[], yticks=[])
        for ax in axes[count:]:
            ax.set_visible(False)
        figure.supxlabel(caption)
        yield axes
        figure.savefig(partial, format="png", dpi=150)
