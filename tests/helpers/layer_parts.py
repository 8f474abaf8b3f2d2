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
    recorded = {}
    handles = []
    names = (name for name in NORMS_BEFORE_MLP if hasattr(layers[0], name))
    before_mlp = before_mlp or next(names, "")

    def keep(key, output):
        if isinstance(output, tuple):
            output = output[0]
        recorded[key] = output.clone()

    def before(module, key):
        def entering(_, args, kwargs):
            if args:
                keep(key, args[0])
            else:
                keep(key, kwargs["hidden_states"])

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
    yield recorded
    for handle in handles:
        handle.remove()


def check_parts(
    states: dict[str, torch.Tensor],
    recorded: dict,
    depth: int,
    is_image: torch.Tensor,
    fused: bool = False,
):
    """Compare the states of all parts with what was recorded, relative to the states of the layer."""
    parts = {site: x for site, x in states.items() if site.startswith(("value_", "attn_", "mlp_"))}
    for layer in LAYERS:
        if ("middle", layer) in recorded:
            middle = recorded["middle", layer]
            recorded["attn", layer] = middle - recorded["in", layer]
            recorded["mlp", layer] = (
                recorded.get(("summed", layer), recorded["out", layer]) - middle
            )
        if ("value", layer) in recorded:
            value = recorded["value", layer].flatten(2)
            if fused:  # 4 heads q, 2 k, 2 v
                value = value.chunk(4, -1)[3]
            recorded["value", layer] = value
        for part in ("attn", "mlp", "value"):
            if (part, layer) not in recorded:
                continue
            expected = recorded[part, layer][:, is_image]
            large = expected
            if part != "value":
                large = recorded["out", layer]
            tolerance = rounding(large, depth * layer)
            torch.testing.assert_close(parts.pop(f"{part}_{layer:02d}"), expected, **tolerance)
            assert expected.abs().max() > 30 * tolerance["atol"]  # else zeros would pass
    assert not parts
