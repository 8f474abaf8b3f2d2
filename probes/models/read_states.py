"""Hidden states of image tokens at all wanted sites, read by hooks in one forward of the stock model.

Shapes: B images, T image tokens, P tokens before the image, N = P + T, d width of a site, R rows of a knockout.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from torch import Tensor, nn

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import check_outputs

from .attention_masks import decode_under, last_rows
from .families.layer_parts import recorded_parts
from .knockout import PREFIX, Knockout
from .shared_layers import (
    DistinctRows,
    States,
    distinct_rows,
    on_device,
    rows_by_site,
    shared_layers,
    skipped_layers,
    unchanged_sites,
)
from .sites import ADAPTER, ENCODER, is_before_adapter, is_encoder_layer, layer_around, part_of
from .steering import Replacement, replaced_states


class StopForward(Exception):
    """Raised by a hook to end the forward after the last wanted site."""


def read_states(
    mllm: nn.Module,
    pixels: Tensor,
    wanted: list[str],
    knockout: Knockout | None,
    rows: Sequence[int] | None,
    hooks: Mapping[str, Replacement],
    known: Mapping[str, Tensor] | None,
) -> States:
    """Return the states f[B or R, T, d] at each wanted site; see :meth:`FrozenMLLM.states`."""
    mllm.check_pixels(pixels)
    mllm.check_hooks(hooks)
    rows = _check_rows(rows, len(pixels))
    shared = _shared_rows(mllm, knockout, rows, hooks)
    given = pixels

    def of_rows(tensor: Tensor) -> Tensor:
        """Return the rows that are asked for, unless the forward pass makes those itself."""
        if rows is None or shared is not None:
            return tensor
        return tensor[rows]

    pixels = of_rows(pixels).to(mllm.device, mllm.model.dtype)
    images = len(pixels)
    start = _first_token(mllm, knockout)
    depth = _last_layer_needed(mllm, wanted)
    masks = mllm.attention_masks(images if shared is None else len(rows), knockout)
    tokens = mllm.ids.shape[1] - start  # on which the layers run
    last = last_rows(masks, tokens)
    cache = mllm.prefix_cache(images, shared) if start and depth > 0 else None
    skipped: list[str] = []
    only_image = mllm.prefix_is_shared and tokens == len(mllm.image_positions)
    if known is not None and shared is None and only_image:
        skipped = unchanged_sites(mllm, known, wanted, given, knockout, hooks)
    layers = mllm.decoder.layers
    with ExitStack() as stack:
        if knockout and depth > 0:
            stack.enter_context(knockout.apply(layers, last, mllm.is_image, depth))
        if skipped:
            begin = of_rows(known[skipped[-1]]).to(mllm.device)
            # encoder and adapter stand before the layers among the sites
            stack.enter_context(skipped_layers(layers, len(skipped) - 2, begin))
        stack.enter_context(replaced_states(layers, hooks, mllm.image_positions - start))
        states = stack.enter_context(_recorded_states(mllm, wanted, images, start))
        if shared is not None:
            stack.enter_context(shared_layers(layers, shared))
        if masks is not None:
            stack.enter_context(decode_under(mllm.decoder, last))
        if skipped:
            run = mllm.decoder
            inputs = {"inputs_embeds": begin}
        else:
            run = mllm.model.model
            inputs = _inputs(mllm, pixels, start)  # of some families this runs the encoder
        with suppress(StopForward):
            run(**mllm.cached(cache), use_cache=cache is not None, **inputs)
    if skipped:  # so are the encoder, and the parts of these layers
        inside = [site for site in wanted if part_of(site) and layer_around(site) in skipped]
        skipped = [*filter(is_encoder_layer, wanted), *skipped, *inside]
    states |= {
        site: of_rows(known[site]) for site in skipped if site in known and site not in hooks
    }
    if missing := [site for site in wanted if site not in states]:
        raise UserError(
            f"no states of {missing[0]}: the forward does not call the module that the family names"
        )
    if shared is not None:
        positions = dict(zip(mllm.sites, rows_by_site(rows, shared), strict=True))
        for site in wanted:
            around = ENCODER if is_encoder_layer(site) else layer_around(site)
            positions[site] = positions[around]
        states = {site: state[positions[site].to(state.device)] for site, state in states.items()}
    states = {site: states[site].to(mllm.device) for site in wanted}
    check_outputs("states", states)
    changed = knockout or hooks or rows is not None
    return States(states.items(), mllm, None if changed else given)


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


def _first_token(mllm: nn.Module, knockout: Knockout | None) -> int:
    """Return the first token that the layers run on: those before it come from the prefix's cache."""
    if not mllm.prefix_is_shared:
        return 0
    if knockout and PREFIX in knockout.names("rows"):
        return 0  # the cached prefix is not cut
    return mllm.prefix_ids.shape[1]


def _last_layer_needed(mllm: nn.Module, wanted: list[str]) -> int:
    """Return the index of the last wanted site, counted from the adapter: 0 and below need no layer of the LLM."""
    of_llm = [site for site in wanted if not is_encoder_layer(site)]
    return max([mllm.sites.index(layer_around(site)) - 1 for site in of_llm], default=-1)


def _inputs(mllm: nn.Module, pixels: Tensor, start: int) -> dict[str, Tensor]:
    """Return the inputs of the whole model for the tokens from `start` on."""
    images = len(pixels)
    is_image = mllm.is_image[start:].expand(images, -1)
    ids = mllm.ids[:, start:].expand(images, -1)
    return {"input_ids": ids} | mllm.family.inputs(mllm.model, pixels, is_image)


def _shared_rows(
    mllm: nn.Module,
    knockout: Knockout | None,
    rows: list[int] | None,
    hooks: Mapping[str, Replacement],
) -> list[DistinctRows] | None:
    """Return the distinct rows at each layer; None if rows share nothing, or have position ids of their own."""
    if rows is None or knockout is None or hooks or not mllm.family.shared_prefix:
        return None
    return on_device(
        distinct_rows(rows, *knockout.by_row(mllm.decoder.layers, len(rows))), mllm.device
    )


@contextmanager
def _recorded_states(
    mllm: nn.Module,
    wanted: list[str],
    batch: int,
    start: int,
) -> Iterator[dict[str, Tensor]]:
    """Record the wanted sites while the context is open, and end the forward after the last of them."""
    states: dict[str, Tensor] = {}
    positions = mllm.image_positions - start
    in_encoder = [site for site in wanted if is_encoder_layer(site)]
    last = max(wanted, key=mllm.all_sites.index)
    after_adapter = [*mllm.decoder.layers, mllm.final_norm]
    modules = dict(zip(mllm.sites[2:], after_adapter, strict=True))

    def record(site: str, state: Tensor) -> None:
        if is_before_adapter(site):
            states[site] = state
        else:
            states[site] = state.index_select(1, positions.to(state.device))
        if site == last:
            raise StopForward

    with ExitStack() as stack:
        if in_encoder:
            stack.enter_context(_recorded_encoder_layers(mllm, in_encoder, batch, record))

        def encoder_hook(_, args):
            return record(ENCODER, _encoder_states(mllm, args, batch))

        stack.callback(
            mllm.family.encoder_output_of(mllm.model).register_forward_pre_hook(encoder_hook).remove
        )

        def adapter_hook(_, args, kwargs):
            return record(ADAPTER, args[0] if args else kwargs["hidden_states"])

        stack.callback(
            mllm.decoder.layers[0].register_forward_pre_hook(adapter_hook, with_kwargs=True).remove
        )
        stack.enter_context(recorded_parts(mllm.layers, wanted, mllm.widths, record))
        for site in (site for site in wanted if site in modules):

            def hook(
                _,
                args,
                out,
                site=site,
            ):
                return record(site, out[0] if isinstance(out, tuple) else out)

            stack.callback(modules[site].register_forward_hook(hook).remove)
        yield states


@contextmanager
def _recorded_encoder_layers(
    mllm: nn.Module,
    wanted: list[str],
    batch: int,
    record: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Record the wanted layers of the encoder while the context is open."""
    encoder = mllm.encoder_layers
    layers = encoder.modules(mllm.model)

    def before_layers(_, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        record(encoder.sites[0], encoder.to_tokens(hidden, batch))

    with ExitStack() as stack:
        if encoder.sites[0] in wanted:
            handle = layers[0].register_forward_pre_hook(before_layers, with_kwargs=True)
            stack.callback(handle.remove)
        for site, layer in zip(encoder.sites[1:], layers, strict=True):
            if site not in wanted:
                continue

            def after(
                _,
                args: tuple,
                out: Tensor | tuple,
                site: str = site,
            ) -> None:
                hidden = out[0] if isinstance(out, tuple) else out
                record(site, encoder.to_tokens(hidden, batch))

            stack.callback(layer.register_forward_hook(after).remove)
        yield


def _encoder_states(mllm: nn.Module, args: tuple, batch: int) -> Tensor:
    """Return the input of the adapter, f[B, T, d]."""
    states = mllm.family.encoder_states(mllm.model, args)
    width = mllm.widths[ENCODER]
    tokens = mllm.image_tokens
    if states.numel() != batch * tokens * width:
        raise UserError(
            f"the encoder outputs {states.numel() / (batch * width):g} tokens per image of width {width}; expected "
            f"{tokens} for the grid {mllm.grid}. Check token_px and encoder_width of the family, and the CLS token"
        )
    return states.reshape(batch, tokens, width)
