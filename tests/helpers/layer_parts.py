"""What layers of stock models add, by plain hooks, and its comparison with the sites inside a layer.

What attention adds is here the input of the norm before the MLP minus the input of the layer, so that no test reads the
module that the package reads.
"""

from contextlib import contextmanager

import torch
from tolerances import rounding
from torch import nn

LAYERS = (1, 2, 3)
# where attention has been added, and the MLP not yet; the last name is that of another norm in some layers
NORMS_BEFORE_MLP = (
    "pre_feedforward_layernorm",
    "ffn_norm",
    "norm2",
    "rms_norm2",
    "layer_norm2",
    "layernorm_after",
    "post_attention_layernorm",
)


@contextmanager
def recorded(layers: nn.ModuleList, values: dict[int, str], before_mlp: str = ""):
    """Record by layer what the stock layers read and return.

    Args:
        layers: The layers.
        values: Paths of modules by layer.
        before_mlp: The module in place of a norm before the MLP.
    """
    found = {}
    handles = []
    names = (name for name in NORMS_BEFORE_MLP if hasattr(layers[0], name))
    before_mlp = before_mlp or next(names, "")

    def keep(key, tensor):
        found[key] = (tensor[0] if isinstance(tensor, tuple) else tensor).clone()

    def before(module, key):
        def entering(_, args, kwargs):
            keep(key, args[0] if args else kwargs["hidden_states"])

        handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))

    def after(module, key):
        handles.append(module.register_forward_hook(lambda _, args, output: keep(key, output)))

    for i, layer in enumerate(layers, 1):
        before(layer, ("in", i))
        after(layer, ("out", i))
        if before_mlp:
            before(layer.get_submodule(before_mlp), ("middle", i))
        else:  # attention and MLP read the same input
            after(layer.self_attn, ("attn", i))
            after(layer.mlp, ("mlp", i))
        if hasattr(layer, "per_layer_input_gate"):  # Gemma 4: after the MLP has been added
            before(layer.per_layer_input_gate, ("summed", i))
        if i in values:
            after(layer.get_submodule(values[i]), ("value", i))
    yield found
    for handle in handles:
        handle.remove()


def check_parts(
    states: dict[str, torch.Tensor],
    found: dict,
    depth: int,
    is_image: torch.Tensor,
    fused: bool = False,
):
    """Compare the states of all parts with what was recorded, relative to the states of the layer."""
    parts = {site: x for site, x in states.items() if site.startswith(("value_", "attn_", "mlp_"))}
    for layer in LAYERS:
        if ("middle", layer) in found:
            middle = found["middle", layer]
            found["attn", layer] = middle - found["in", layer]
            found["mlp", layer] = found.get(("summed", layer), found["out", layer]) - middle
        if ("value", layer) in found:
            value = found["value", layer].flatten(2)
            # 4 heads q, 2 k, 2 v
            found["value", layer] = value.chunk(4, -1)[3] if fused else value
        for part in ("attn", "mlp", "value"):
            if (part, layer) not in found:
                continue
            expected = found[part, layer][:, is_image]
            large = found["out", layer] if part != "value" else expected
            tolerance = rounding(large, depth * layer)
            torch.testing.assert_close(parts.pop(f"{part}_{layer:02d}"), expected, **tolerance)
            assert expected.abs().max() > 30 * tolerance["atol"]  # else zeros would pass
    assert not parts
