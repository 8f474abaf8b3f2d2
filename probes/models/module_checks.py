"""What is measured of a user's module: its tokens, the order of its layers, and their attention and MLP.

A layer that runs before or after the named ones is not read, and no error: sites can be chosen so. Nor can a hook see a
layer that is no module. `unread_notes` says what shows of either.

Shapes: B images, h x w patches, T patches, N tokens (others, then patches), d width, L layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava_bidir.common.errors import UserError, error_context

from .hooks import StopForward, at_input

TOLERANCE = 1e-3  # of sums, relative to what is added: float32, or less
NEAR = 4  # patches: a convolutional stem mixes neighbours
ATTENTION = ("attn", "self_attn", "attention")
# Modules of a layer whose output may be what attention, or the MLP, adds; the first pair that adds up is taken
CANDIDATES = {
    "attn": ("drop_path1", "ls1", "layer_scale1", *ATTENTION),
    "mlp": ("drop_path2", "ls2", "layer_scale2", "mlp", "feed_forward", "ffn"),
}


class LayerRun(NamedTuple):
    """States that a layer reads and writes, f[B, N, d]."""

    entered: Tensor
    left: Tensor


def first_output(output: Tensor | tuple) -> Tensor:
    """Return the states in what a layer returns: itself, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


@contextmanager
def _outputs(
    modules: Sequence[nn.Module], record: Callable[[int, tuple, Tensor], None]
) -> Iterator[None]:
    """Call record(index, args, output) after each of some modules while the context is open."""
    with ExitStack() as stack:
        for i, module in enumerate(modules):

            def hook(
                _,
                args: tuple,
                output: Tensor | tuple,
                i: int = i,
            ) -> None:
                record(i, args, first_output(output))

            stack.callback(module.register_forward_hook(hook).remove)
        yield


def noise(model: nn.Module, images: int, side: int) -> Tensor:
    """Return pixels of noise f[B, 3, S, S]."""
    drawn = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    return drawn.to(model.device, model.dtype)


def trace_layers(
    model: nn.Module,
    layers: Sequence[nn.Module],
    names: Sequence[str],
    image_px: int,
) -> list[LayerRun]:
    """Return what each layer read and wrote in a forward of two images of noise.

    Raises:
        UserError: The forward fails, a layer does not run once, its states are not f[B, N, d], or it does not read what
            the layer before it wrote.
    """
    runs: dict[int, LayerRun] = {}

    def record(i: int, args: tuple, output: Tensor) -> None:
        if i in runs:
            raise UserError(f"layer {names[i]} runs several times in a forward; expected once")
        if not args or not isinstance(args[0], Tensor):
            raise UserError(f"layer {names[i]} is called without states as its first argument")
        for states in (args[0], output):
            if not isinstance(states, Tensor) or states.ndim != 3 or len(states) != 2:
                got = list(states.shape) if isinstance(states, Tensor) else type(states).__name__
                raise UserError(
                    f"states of 2 images at layer {names[i]} are {got}; expected [2, tokens, width]"
                )
        runs[i] = LayerRun(args[0].clone(), output.clone())

    with (
        error_context(f"a forward of 2 x 3 x {image_px} x {image_px} px"),
        _outputs(layers, record),
    ):
        model(noise(model, 2, image_px))
    if missing := [name for i, name in enumerate(names) if i not in runs]:
        raise UserError(f"layer {missing[0]} does not run in a forward; layers is {list(names)}")
    for i, name in enumerate(names[1:], 1):
        before, now = runs[i - 1].left, runs[i].entered
        if before.shape != now.shape or not torch.allclose(before, now, rtol=1e-4, atol=1e-5):
            raise UserError(
                f"layer {name} does not read what {names[i - 1]} wrote. Name all layers, in the order of the "
                "forward; `sites` chooses which of them are probed"
            )
    return [runs[i] for i in range(len(names))]


def check_tokens(
    model: nn.Module,
    first: nn.Module,
    grid: tuple[int, int],
    patch: int,
) -> tuple[int, bool]:
    """Return the number of tokens before the patches, and whether patches have been mixed before the first layer.

    A patch of the image must change its own token most. If it changes tokens far from it, too, patches have been mixed.

    Args:
        model: Called with pixels.
        first: Its first layer, at whose input patches have not been mixed.
        grid: h and w.
        patch: Side of a patch in pixels.

    Raises:
        UserError: There are fewer tokens than patches, or patches are not in raster order after the other tokens.
    """
    rows, columns = grid
    cells = [
        (0, 0),
        (0, columns - 1),
        (rows - 1, 0),
        (rows - 1, columns - 1),
        (rows // 3, columns // 2),
    ]
    pixels = noise(model, 1, rows * patch).repeat(len(cells) + 1, 1, 1, 1)
    for image, (row, column) in enumerate(cells, 1):
        pixels[
            image, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch
        ] *= -1
    found: list[Tensor] = []

    def stop(states: Tensor) -> None:
        found.append(states.float())
        raise StopForward

    with at_input(first, stop), suppress(StopForward):
        model(pixels)
    (states,) = found
    extra = states.shape[1] - rows * columns
    if extra < 0:
        raise UserError(
            f"the first layer reads {states.shape[1]} tokens, and the input has {rows} x {columns} patches of {patch} "
            "px: patch or image_px does not fit"
        )
    changed = (states[1:] - states[:1]).norm(dim=-1).argmax(1).tolist()
    for (row, column), token in zip(cells, changed, strict=True):
        expected = extra + row * columns + column
        if token != expected:
            raise UserError(
                f"the patch in row {row}, column {column} of {rows} x {columns} changes token {token} most at the "
                f"first layer; expected token {expected}, i.e. {extra} other tokens, then patches of {patch} px in "
                "raster order"
            )
    return extra, _is_mixed(states[:, extra:], cells, grid)


def _is_mixed(states: Tensor, cells: Sequence[tuple[int, int]], grid: tuple[int, int]) -> bool:
    """Return whether the patch that was changed in each image but the first one changes far patches, too.

    Args:
        states: f[1 + C, T, d], without and with a change.
        cells: Row and column of each changed patch.
        grid: h and w.
    """
    changed = (states[1:] - states[:1]).norm(dim=-1).cpu().unflatten(1, grid)
    at = torch.cartesian_prod(*map(torch.arange, grid)).view(*grid, 2)
    for cell, change in zip(cells, changed, strict=True):
        is_far = (at - torch.tensor(cell)).abs().amax(-1) > NEAR
        if is_far.any() and change[is_far].max() > TOLERANCE * change[cell]:
            return True
    return False


def unread_notes(
    model: nn.Module,
    module: nn.Module,
    names: Sequence[str],
    norm: str | None,
    trace: Sequence[LayerRun],
    mixed: bool,
    image_px: int,
) -> list[str]:
    """Return sentences about layers that are not read, and what the named ones do not read or write.

    Args:
        model: Called with pixels.
        module: The user's module in it, whose paths are named.
        names: Paths of the layers.
        norm: Path of the norm after them.
        trace: What they read and wrote, of :func:`trace_layers`.
        mixed: Of :func:`check_tokens`.
        image_px: Side of the input in pixels.
    """
    kinds = {type(module.get_submodule(name)) for name in names}
    others = {
        name: other
        for name, other in module.named_modules()
        if type(other) in kinds and not any(f"{name}.".startswith(f"{own}.") for own in names)
    }
    ran: list[str] = []
    normed: list[Tensor] = []
    paths = list(others)

    def record(index: int, args: tuple, output: Tensor) -> None:
        if index == len(paths):
            normed.extend(args[:1])
        elif isinstance(output, Tensor) and output.shape[-1] == trace[0].entered.shape[-1]:
            ran.append(paths[index])

    of_norm = [module.get_submodule(norm)] if norm else []
    with _outputs([*others.values(), *of_norm], record):
        model(noise(model, 2, image_px))
    notes = []
    if ran:
        which = f"{', '.join(ran)}, of the same class as layers that are named,"
        notes.append(f"{which} also {'run' if len(ran) > 1 else 'runs'} in a forward, unread")
    if mixed:
        notes.append(
            f"what {names[0]} reads of a patch depends on patches far from it: something before it mixes patches, "
            "which is not read, and layer_00 is not the patch embeddings"
        )
    if normed and not _is_part_of(normed[0], trace[-1].left):
        notes.append(
            f"what {norm} reads in a forward is not what {names[-1]} wrote: something between them is not read"
        )
    return notes


def _is_part_of(entered: Tensor, states: Tensor) -> bool:
    """Return whether each vector that a norm read is a token's state, or a mean of tokens, f[B, N, d] the states."""
    read = entered.flatten(1, -2) if entered.ndim > 2 else entered[:, None]
    if len(read) != len(states) or read.shape[-1] != states.shape[-1]:
        return False
    states = states.float()
    counts = torch.arange(states.shape[1], 0, -1, device=states.device)
    means = states.flip(1).cumsum(1).flip(1) / counts[:, None]  # of the last 1 to N tokens
    known = torch.cat([states, means], 1)
    nearest = torch.cdist(read.float(), known).amin(-1)
    return bool((nearest <= TOLERANCE * known.norm(dim=-1).amax()).all())


def check_norm(norm: nn.Module, name: str, states: Tensor) -> int:
    """Return the width after a norm; raise a UserError if it does not take states f[B, N, d]."""
    with error_context(f"norm {name}, of states {list(states.shape)}"):
        normed = norm(states)
        if normed.shape[:-1] != states.shape[:-1]:
            raise UserError(f"it returns {list(normed.shape)}")
    return normed.shape[-1]


def find_parts(
    model: nn.Module,
    layers: Sequence[nn.Module],
    names: Sequence[str],
    trace: Sequence[LayerRun],
    image_px: int,
) -> str:
    """Find the modules of each layer whose outputs add up, with its input, to its output; why there are none, else "".

    They are kept as `own_parts` of the layer (families/layer_parts.py).

    Args:
        model: Called with pixels.
        layers: Its layers.
        names: Their paths.
        trace: What they read and wrote, of :func:`trace_layers`.
        image_px: Side of the input in pixels.
    """
    candidates = [
        (i, part, path, getattr(layer, path))
        for i, layer in enumerate(layers)
        for part, paths in CANDIDATES.items()
        for path in paths
        if isinstance(getattr(layer, path, None), nn.Module)
    ]
    outputs: dict[int, Tensor] = {}

    def record(index: int, args: tuple, output: Tensor) -> None:
        outputs[index] = output.clone() if isinstance(output, Tensor) else None

    with _outputs([module for *_, module in candidates], record):
        model(noise(model, 2, image_px))
    for i, (layer, name) in enumerate(zip(layers, names, strict=True)):
        of_layer: dict[str, dict[str, Tensor]] = {part: {} for part in CANDIDATES}
        for index, (number, part, path, _) in enumerate(candidates):
            if number == i and outputs.get(index) is not None:
                of_layer[part][path] = outputs[index]
        pair = _pair_that_adds_up(of_layer, trace[i])
        if pair is None:
            return (
                f"{name}, a {type(layer).__name__}, has no attention and MLP whose outputs add up to what it "
                "adds to its input"
            )
        layer.own_parts = {part: (path,) for part, path in pair.items()}
    return ""


def _pair_that_adds_up(
    outputs: dict[str, dict[str, Tensor]], run: LayerRun
) -> dict[str, str] | None:
    """Return the paths of attention and MLP whose outputs explain a layer's, None if there are none."""
    added = run.left - run.entered
    rounding = (
        torch.finfo(run.left.dtype).eps * run.left.norm()
    )  # where layer scale is small, it is all there is
    most = TOLERANCE * added.norm() + rounding
    if not outputs["attn"].keys() & {*ATTENTION}:
        return None
    for attn, by_attn in outputs["attn"].items():
        for mlp, by_mlp in outputs["mlp"].items():
            if by_attn.shape == by_mlp.shape == added.shape:
                if (by_attn + by_mlp - added).norm() <= most:
                    return {"attn": attn, "mlp": mlp}
    return None
