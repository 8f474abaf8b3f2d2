"""States that are patched or steered on the way through the LLM.

Shapes: B images, T image tokens, N tokens, d width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from llava_bidir.common.errors import UserError

from .sites import ADAPTER, layer_site

Replacement = Callable[[Tensor], Tensor]  # f[B, T, d] -> f[B, T, d]


@contextmanager
def replaced_states(
    layers: nn.ModuleList,
    hooks: Mapping[str, Replacement],
    positions: Tensor,
    input_site: str = ADAPTER,
) -> Iterator[None]:
    """Replace the states of the image tokens at sites by what `hooks` return while the context is open.

    Args:
        layers: Layers of the LLM, or of a vision encoder.
        hooks: Functions by site: the input of the first layer, or the output of a layer.
        positions: i64[T] of the image tokens among those that the layers run on.
        input_site: Name of the input of the first layer.

    Raises:
        UserError: A site is neither, or a function returns states of another shape.
    """
    modules = {layer_site(i): layer for i, layer in enumerate(layers, 1)}
    with ExitStack() as stack:
        for site, function in hooks.items():

            def replace(
                states: Tensor, site: str = site, function: Replacement = function
            ) -> Tensor:
                of_image = positions.to(states.device)
                given = states.index_select(1, of_image)
                new = function(given)
                expected = given.shape
                if not isinstance(new, Tensor) or new.shape != expected:
                    returned = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
                    raise UserError(
                        f"hook at {site!r} returned {returned}; expected {list(expected)}"
                    )
                return states.index_copy(1, of_image, new.to(states))

            def before(
                _,
                args: tuple,
                kwargs: dict,
                replace: Replacement = replace,
            ) -> tuple[tuple, dict]:
                if args:
                    return (replace(args[0]), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": replace(kwargs["hidden_states"])}

            def after(
                _,
                args: tuple,
                out: Tensor | tuple,
                replace: Replacement = replace,
            ) -> Tensor | tuple:
                return (replace(out[0]), *out[1:]) if isinstance(out, tuple) else replace(out)

            if site == input_site:
                handle = layers[0].register_forward_pre_hook(before, with_kwargs=True)
            elif site in modules:
                handle = modules[site].register_forward_hook(after)
            else:
                raise UserError(f"hook at {site!r}: expected {input_site} or {', '.join(modules)}")
            stack.callback(handle.remove)
        yield
