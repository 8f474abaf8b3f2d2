"""Hooks of `states` against forward hooks on the stock model."""

import pytest
import tiny_models
import torch
from tolerances import rounding

import probes
from probes import Knockout


@pytest.fixture(
    scope="module", params=["causal", "bidirectional"]
)  # a prefix that sees the image would differ, too
def mllm(request, checkpoints):
    return probes.load(str(checkpoints[request.param]))


def steer(states):
    return 0.5 * states.flip(0) + torch.linspace(-1, 1, states.shape[-1])


def stock_states(mllm, pixels, site):
    """hidden_states of the full sequence, with text after the image, steered by a plain hook on the stock modules."""
    first = mllm.prefix_ids.shape[1]
    image = slice(first, first + tiny_models.TOKENS)

    def replace(states):
        states = states.clone()
        states[:, image] = steer(states[:, image])
        return states

    layers = mllm.model.model.language_model.layers
    if site == "adapter":
        handle = layers[0].register_forward_pre_hook(lambda _, args: (replace(args[0]), *args[1:]))
    else:
        handle = layers[int(site[-2:]) - 1].register_forward_hook(lambda _, args, out: replace(out))
    ids = torch.cat([mllm.ids, torch.tensor([[5, 6, 7]])], 1).expand(len(pixels), -1)
    with torch.no_grad():
        states = mllm.model(
            input_ids=ids,
            pixel_values=pixels,
            output_hidden_states=True,
        ).hidden_states
    handle.remove()
    return dict(
        zip(
            ["adapter", "layer_01", "layer_02", "final_norm"],
            [s[:, image] for s in states],
            strict=True,
        )
    )


@pytest.mark.parametrize("site", ["adapter", "layer_01", "layer_02", "layer_03"])
def test_equals_a_hook_on_the_stock_model(mllm, pixels, site):
    steered = mllm.states(pixels, hooks={site: steer})
    plain = mllm.states(pixels)
    expected = stock_states(mllm, pixels, site)
    for depth, name in enumerate(mllm.sites):
        if mllm.sites.index(name) < mllm.sites.index(site):
            assert torch.equal(steered[name], plain[name])
        elif (
            name in expected and name != site
        ):  # transformers reads a layer's output before the plain hook changes it
            torch.testing.assert_close(
                steered[name], expected[name], **rounding(expected[name], depth + 1)
            )
            assert not torch.allclose(steered[name], plain[name], atol=1e-2)
    torch.testing.assert_close(steered[site], steer(plain[site]))
    assert all(torch.equal(a, plain[name]) for name, a in mllm.states(pixels).items()), (
        "hooks are removed"
    )


def test_hooks_compose_with_knockouts_and_rows(mllm, pixels):
    blocked = torch.tensor([[False, True, False, False]] * 2)
    together = mllm.states(
        pixels,
        ["layer_03"],
        Knockout(blocked, [3]),
        rows=[0, 2],
        hooks={"layer_02": lambda s: 2 * s},
    )
    alone = mllm.states(
        pixels[[0, 2]], ["layer_03"], Knockout(blocked, [3]), hooks={"layer_02": lambda s: 2 * s}
    )
    torch.testing.assert_close(together["layer_03"], alone["layer_03"])
