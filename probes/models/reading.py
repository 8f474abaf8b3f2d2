"""Hidden states of image tokens at all wanted sites, read and replaced by hooks in one forward of the stock model.

Shapes: B images, T image tokens, N tokens, d width of a site, R rows of a knockout.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import check_outputs

from .families.layer_parts import part_module, part_multiplier
from .hooks import StopForward, at_arguments, at_input, at_output, with_arguments
from .knockout import Knockout
from .sites import (
    ADAPTER,
    ENCODER,
    FINAL_NORM,
    VALUE,
    is_before_adapter,
    is_encoder_layer,
    layer_number,
    part_of,
)

Replacement = Callable[[Tensor], Tensor]  # f[B, T, d] -> f[B, T, d]
Hooks = Mapping[str, Replacement]  # by site
HookPlace = Callable[[Callable], AbstractContextManager[None]]  # opens a hook that calls a function
Read = Callable[[Any], Tensor]  # what is found at a place -> f[B, T, d]


def read_states(
    model: nn.Module,
    pixels: Tensor,
    sites: list[str],
    knockout: Knockout | None,
    rows: Sequence[int] | None,
    hooks: Hooks,
) -> dict[str, Tensor]:
    """Return the states f[B or R, T, d] at each wanted site; see :meth:`FrozenModel.states`."""
    model.check_pixels(pixels)
    rows = _check_rows(rows, len(pixels))
    one_encoder = rows is not None and model.rows_share_encoder
    if knockout and knockout.in_encoder:
        one_encoder = False
    count = len(rows or pixels)
    if rows is not None and not one_encoder:
        pixels = pixels[rows]
    in_order = sorted(sites, key=model.all_sites.index)
    states: dict[str, Tensor] = {}

    def record(site: str, read: Read, output: Any) -> None:
        states[site] = read(output)
        if site == in_order[-1]:
            raise StopForward

    with ExitStack() as stack:
        stack.enter_context(model.masked(knockout, count, in_order[-1]))
        if one_encoder:
            stack.enter_context(_as_rows(model.layers, rows))
        stack.enter_context(replaced_states(model, hooks))
        for site in in_order:
            place, read = _place_of(model, site, len(pixels))
            stack.enter_context(place(partial(record, site, read)))
        with suppress(StopForward):
            model.run(pixels.to(model.device, model.model.dtype))
    if one_encoder:
        for site in filter(is_before_adapter, states):
            states[site] = states[site][rows]
    return _check_states(states, sites, model.device)


def _check_states(
    states: Mapping[str, Tensor], sites: list[str], device: torch.device
) -> dict[str, Tensor]:
    """Return the states of the wanted sites on a device; raise a UserError if some were not read or are not finite."""
    if missing := [site for site in sites if site not in states]:
        raise UserError(
            f"no states of {missing[0]}: the forward does not call the module that the family names"
        )
    wanted = {site: states[site].to(device) for site in sites}
    check_outputs("states", wanted)
    return wanted


@contextmanager
def replaced_states(model: nn.Module, hooks: Hooks) -> Iterator[None]:
    """Replace the states of the image tokens at sites by what `hooks` return while the context is open.

    Raises:
        UserError: A site is neither the input of the first layer nor a layer, or a function returns states of another
            shape.
    """

    def change(site: str, function: Replacement, states: Tensor) -> Tensor:
        of_image = model.image_positions.to(states.device)
        given = states.index_select(1, of_image)
        new = function(given)
        if not isinstance(new, Tensor) or new.shape != given.shape:
            raise UserError(
                f"hook at {site!r} returned {describe_shape(new)}; expected {list(given.shape)}"
            )
        return states.index_copy(1, of_image, new.to(states))

    model.check_hooks(hooks)
    with ExitStack() as stack:
        for site, function in hooks.items():
            place = _place_of_layer(model, site)
            stack.enter_context(place(partial(change, site, function)))
        yield


def _place_of(model: nn.Module, site: str, images: int) -> tuple[HookPlace, Read]:
    """Return where a site is, and what makes its states of what is found there."""

    def of_image(states: Tensor) -> Tensor:
        return states.index_select(1, model.image_positions.to(states.device))

    if part_of(site):
        layer = model.layers[layer_number(site) - 1]
        read = partial(_of_part, site, part_multiplier(layer, part_of(site)), model.widths[site])
        return partial(at_output, part_module(layer, site)), lambda states: of_image(read(states))
    if is_encoder_layer(site):
        encoder = model.encoder_layers
        place = _before_or_after(encoder.modules(model.model), layer_number(site))
        return place, lambda states: encoder.to_tokens(states, images)
    if site == ENCODER:
        module = model.family.encoder_output_of(model.model)
        return partial(at_arguments, module), partial(_encoder_states, model, images)
    if site != FINAL_NORM:
        return _place_of_layer(model, site), of_image
    if model.has_llm:
        return partial(at_output, model.final_norm), of_image
    # CLIP applies its norm to the CLS token only
    return partial(at_output, model.layers[-1]), lambda states: model.final_norm(of_image(states))


def _place_of_layer(model: nn.Module, site: str) -> HookPlace:
    """Return where the output of a layer is, or the input of the first one."""
    if site == ADAPTER:
        return _before_or_after(model.layers, 0)
    return _before_or_after(model.layers, layer_number(site))


def _before_or_after(layers: nn.ModuleList, number: int) -> HookPlace:
    """Return the place after layer 1..L, or before the first one for 0."""
    if number:
        return partial(at_output, layers[number - 1])
    return partial(at_input, layers[0])


def _of_part(site: str, multiplier: float | Tensor | None, width: int, states: Tensor) -> Tensor:
    """Return what a module gives as the part f[B, N, width] of a layer."""
    if part_of(site) == VALUE:  # heads as an axis of their own, or after queries and keys
        return states.flatten(2)[..., -width:]
    if multiplier is None:
        return states
    return states * multiplier


def _encoder_states(model: nn.Module, images: int, args: tuple) -> Tensor:
    """Return the input of the adapter, f[B, T, d]."""
    states = model.family.encoder_states(model.model, args)
    width = model.widths[ENCODER]
    tokens = model.image_tokens
    if states.numel() != images * tokens * width:
        raise UserError(
            f"the encoder outputs {states.numel() / (images * width):g} tokens per image of width {width}; expected "
            f"{tokens} for the grid {model.grid}. Check token_px and encoder_width of the family, and the CLS token"
        )
    return states.reshape(images, tokens, width)


@contextmanager
def _as_rows(layers: nn.ModuleList, rows: list[int]) -> Iterator[None]:
    """Run layers on rows of the images that enter the first one; all images have the same positions."""

    def of_one_row(arguments: dict) -> dict:
        names = {"position_embeddings", "position_ids"} & arguments.keys()
        return {name: _first_row(arguments[name]) for name in names}

    def take_rows(states: Tensor) -> Tensor:
        return states[rows]

    with ExitStack() as stack:
        stack.enter_context(at_input(layers[0], take_rows))
        for layer in layers:
            stack.enter_context(with_arguments(layer, of_one_row))
        yield


def _first_row(positions: Any) -> Any:
    """Return positions [1 or B, N, ...], or a tuple of them, as those of one row."""
    if isinstance(positions, tuple):
        return tuple(map(_first_row, positions))
    if positions is None:
        return None
    return positions[:1]


def describe_shape(value: Any) -> list[int] | str:
    """Return the shape of a tensor, or the name of another class, for a message."""
    if isinstance(value, Tensor):
        return list(value.shape)
    return type(value).__name__


def _check_rows(rows: Sequence[int] | None, images: int) -> list[int] | None:
    """Return the image of each row as int; raise a UserError if there is none, or no such image."""
    if rows is None:
        return None
    rows = [int(row) for row in rows]
    if not rows:
        raise UserError("got no rows; expected the image of each row, or None")
    for row, image in enumerate(rows):
        if not 0 <= image < images:
            raise UserError(f"row {row} is of image {image}; expected 0 to {images - 1}")
    return rows
