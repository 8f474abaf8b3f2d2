"""The code of probes/models/hooks.md, and plain torch hooks beside the hooks of `states`."""

import re
from pathlib import Path

import tiny_models
import torch
from PIL import Image
from tolerances import assert_near

import probes

PAGE = Path(probes.__file__).parent / "models/hooks.md"
PATH = "runs/demo/causal/planted/hf"


def stock_states(mllm, pixels, change) -> torch.Tensor:
    """Return the normed states of image tokens, with those after layer 2 changed, and text after the image."""
    image = mllm.image_positions
    first = mllm.prefix_ids.shape[1]
    ids = torch.cat([mllm.ids, torch.tensor([[5, 6, 7]])], 1).expand(len(pixels), -1)

    def hook(_, args, states):
        states = states.clone()
        states[:, image] = change(states[:, image])
        return states

    with mllm.layers[1].register_forward_hook(hook), torch.no_grad():
        hidden = mllm.model(
            input_ids=ids, pixel_values=pixels, output_hidden_states=True
        ).hidden_states
    return hidden[-1][:, first : first + tiny_models.TOKENS]


def test_code_of_the_page_equals_plain_hooks_on_the_stock_forward(
    checkpoints, tmp_path, monkeypatch
):
    """All Python blocks run in one folder with two photos."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / PATH
    folder.parent.mkdir(parents=True)
    folder.symlink_to(checkpoints["causal"])
    Image.new("RGB", (30, 20), "red").save("photo.jpg")
    Image.radial_gradient("L").convert("RGB").save("other.jpg")
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        exec(block, names)
    mllm = names["mllm"]
    pixels = names["pixels"]
    states = names["states"]
    assert list(states) == [*mllm.encoder_sites, *mllm.sites]
    other = states["layer_02"][[1, 0]]
    difference = (states["layer_02"][1] - states["layer_02"][0]).mean(0)
    changes = {
        "patched": lambda f: other,
        "steered": lambda f: f + 4 * difference,
        "ablated": lambda f: f.mean(1, keepdim=True),
        "by_hand": lambda f: f + difference,
    }
    for name, change in changes.items():
        got = names[name]["final_norm"]
        expected = stock_states(mllm, pixels, change)
        assert_near(got, expected, 4)
        assert not torch.allclose(got, states["final_norm"], atol=1e-3), name
