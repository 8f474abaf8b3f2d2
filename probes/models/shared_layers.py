"""Layers that rows of a batch share: the rows of an image run as one until their knockouts differ.

A knockout changes nothing before the first layer that it cuts. Rows that are cut alike up to a layer have the same
states there, so the layer runs once for all of them, and the next one begins with copies of its output. In a sweep over
windows of layers, a row begins at its first own cut, and the encoder runs once per image. Given the states of
the unchanged images, the encoder and the layers before the first change do not run.

Shapes: B images, R rows of the knockout, n distinct rows at a layer, L layers, N tokens.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_bidir.common.errors import UserError

from .knockout import Knockout
from .sites import layer_around


class DistinctRows(NamedTuple):
    """The distinct rows of a layer."""

    # long[n], their positions among the distinct rows of the layer before; the first layer's: images
    parents: Tensor
    first: Tensor  # long[n], the first row of the knockout that each one stands for
    of_row: Tensor  # long[R], the distinct row that stands for each row of the knockout


def distinct_rows(
    images: Sequence[int],
    cuts: Sequence[Hashable],
    layers: Tensor,
) -> list[DistinctRows]:
    """Return the distinct rows at each layer.

    Three rows of one image in three layers; the first one is not cut, the others block the same tokens c::

        layers cut   none    2     2, 3
        layer 1        0     0     0         nothing is cut yet
        layer 2        0     1     1
        layer 3        0     1     2         the second row is no longer cut

    Args:
        images: The image of each row, R of them.
        cuts: What a row's knockout cuts, equal for equal knockouts.
        layers: bool[R, L], the layers in which it does.
    """
    current = list(images)
    plan = []
    for cut_here in layers.T.tolist():
        numbers: dict[tuple, int] = {}  # of distinct rows, by their parent and what is cut
        parents = []
        first = []
        of_row = []
        for i, parent in enumerate(current):
            cut = cuts[i] if cut_here[i] else None
            key = (parent, cut)
            if key not in numbers:
                numbers[key] = len(numbers)
                parents.append(parent)
                first.append(i)
            of_row.append(numbers[key])
        rows = DistinctRows(
            parents=torch.tensor(parents),
            first=torch.tensor(first),
            of_row=torch.tensor(of_row),
        )
        plan.append(rows)
        current = of_row
    return plan


def on_device(plan: Sequence[DistinctRows], device: torch.device) -> list[DistinctRows]:
    """Return the plan on a device, moved in one copy, since each copy waits for the device."""
    parts: list[Tensor] = []
    for rows in plan:
        parts.extend(rows)
    sizes = [len(part) for part in parts]
    moved = torch.cat(parts).to(device).split(sizes)
    return [DistinctRows(*moved[i : i + 3]) for i in range(0, len(moved), 3)]


def rows_by_site(images: Sequence[int], plan: Sequence[DistinctRows]) -> list[Tensor]:
    """Return the position of each row among the recorded states, long[R], per site from "encoder" to "final_norm"."""
    of_image = torch.tensor(images, device=plan[0].of_row.device)
    return [of_image, of_image, *(layer.of_row for layer in plan), plan[-1].of_row]


@contextmanager
def shared_layers(layers: nn.ModuleList, plan: Sequence[DistinctRows]) -> Iterator[None]:
    """Run each layer on its distinct rows while the context is open.

    The masks that the layers receive have R rows; register hooks that replace them before. All rows must have the same
    position ids.
    """

    def take_parents(rows: DistinctRows, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = _states_of(args, kwargs)
        of_parents = states[rows.parents.to(states.device)]
        kwargs = dict(kwargs)
        for key in ("position_embeddings", "position_ids"):
            if key in kwargs:
                kwargs[key] = _one_row(kwargs[key])
        return _with_states(args, kwargs, of_parents)

    def take_masks(rows: DistinctRows, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs["attention_mask"]
        of_first = mask[rows.first.to(mask.device)]
        return args, kwargs | {"attention_mask": of_first}

    with ExitStack() as hooks:

        def register(module: nn.Module, take: Callable, rows: DistinctRows) -> None:
            def hook(_, args, kwargs):
                return take(rows, args, kwargs)

            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)

        for layer, rows in zip(layers, plan, strict=True):
            register(layer, take_parents, rows)
            register(layer.self_attn, take_masks, rows)
        yield


def _states_of(args: tuple, kwargs: dict) -> Tensor:
    """Return the hidden states among a layer's arguments: the first one, or one by name."""
    return args[0] if args else kwargs["hidden_states"]


def _with_states(args: tuple, kwargs: dict, states: Tensor) -> tuple[tuple, dict]:
    """Return a layer's arguments with other hidden states."""
    if args:
        return (states, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": states}


def version(tensor: Tensor) -> int:
    """Return the number of in-place edits of a tensor; 0 for those of inference mode, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version


class States(dict[str, Tensor]):
    """States f[B, T, d] by site that know what they are of, so that no other forward starts from them."""

    def __init__(
        self,
        states: Iterable[tuple[str, Tensor]],
        mllm: nn.Module,
        pixels: Tensor | None,
    ):
        super().__init__(states)
        self.pixels = pixels  # f[B, 3, H, W]; None for those of a changed forward
        self.pixels_version = 0 if pixels is None else version(pixels)
        self.image_attention = mllm.image_attention
        self.prefix = mllm.prefix_ids
        self.weights = mllm.weights_key()

    def __missing__(self, site: str) -> Tensor:
        """Raise a KeyError that names the sites that were read."""
        raise KeyError(f"no states of {site!r}; these are of {', '.join(self)}")

    def check(self, mllm: nn.Module, pixels: Tensor) -> None:
        """Raise a UserError unless a forward of `mllm` on `pixels` gives these states."""
        is_unedited = self.pixels is not None and version(self.pixels) == self.pixels_version
        if not is_unedited or not torch.equal(self.pixels.to(pixels), pixels):
            raise UserError(
                "known states are of other pixels, or of a changed forward; expected the same, unchanged"
            )
        if self.image_attention != mllm.image_attention:
            masks = f"{self.image_attention}, but the model's is {mllm.image_attention}"
            raise UserError(f"known states are of another mask among image tokens: {masks}")
        if self.prefix is not mllm.prefix_ids:
            raise UserError("known states are of another prefix before the image; read them again")
        if self.weights != mllm.weights_key():
            raise UserError(
                "known states are of other weights, or of weights that have changed; read them again"
            )


def unchanged_sites(
    mllm: nn.Module,
    known: Mapping[str, Tensor],
    wanted: list[str],
    pixels: Tensor,
    knockout: Knockout | None,
    hooks: Mapping,
) -> list[str]:
    """Return the sites up to the one at whose `known` states a forward to the `wanted` sites can start; [] for none.

    Raises:
        UserError: Known states lack a wanted site, have another shape, or are of another forward.
    """
    for site in wanted:
        expected = [len(pixels), mllm.image_tokens, mllm.widths[site]]
        shape = list(known[site].shape) if site in known else "nothing"
        if shape != expected:
            raise UserError(
                f"known states have {shape} at {site!r}; expected {expected}, of the same pixels"
            )
    if isinstance(known, States):
        known.check(mllm, pixels)
    layers = mllm.decoder.layers
    number = {site: i for i, site in enumerate(mllm.sites)}
    around = map(layer_around, wanted)
    last = max([number[site] for site in around if site in number], default=0)
    changed = [number[site] for site in hooks if site in number]
    if knockout:
        # "encoder" and "adapter" precede "layer_01"
        changed.append(knockout.first_layer(layers) + 1)
    first_change = min([*changed, last, len(layers) + 1])
    # The adapter's own states are known, also if a hook replaces them; at least the last layer runs.
    end = max(2, first_change)
    while end > 1 and mllm.sites[end - 1] not in known:
        end -= 1
    if 1 < end <= last:
        return mllm.sites[:end]
    return []


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Run `forward` in place of a module's own while the context is open; its hooks run as before."""
    wrapped = vars(module).get("forward")  # accelerate's, which moves inputs to the module's device
    module.forward = forward
    try:
        yield
    finally:
        if wrapped is None:
            del module.forward
        else:
            module.forward = wrapped


@contextmanager
def skipped_layers(layers: nn.ModuleList, count: int, states: Tensor) -> Iterator[None]:
    """Skip the first `count` layers while the context is open; the next one continues with `states` f[B, N, d].

    Register hooks that replace states after this one.
    """

    def substitute(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = _states_of(args, kwargs)
        return _with_states(args, kwargs, states.to(given))

    def skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    with ExitStack() as stack:
        for layer in layers[:count]:
            stack.enter_context(replaced_forward(layer, skip))
        next_layer = layers[count]
        handle = next_layer.register_forward_pre_hook(substitute, with_kwargs=True)
        stack.callback(handle.remove)
        yield


def _one_row(positions: Any) -> Any:
    """Return positions [1 or B, N, ...], or a tuple of them, as those of one row."""
    if isinstance(positions, tuple):
        return tuple(_one_row(part) for part in positions)
    return None if positions is None else positions[:1]
