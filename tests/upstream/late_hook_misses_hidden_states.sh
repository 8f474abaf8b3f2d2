#!/usr/bin/env bash
# Workaround: states are read by hooks of our own; probes/models/hooks.md, rule 5.
#
# A forward hook that replaces a layer's output is missing in `hidden_states`, if the model had run before.
#
# Guess: what a hook returns is what everybody reads, the next layer and `output_hidden_states=True` alike, and when it
# was registered makes no difference.
# Found (transformers 5.24.0, torch 2.13.0, on a CPU): transformers collects `hidden_states` by forward hooks of its own,
# which it registers in the first forward that asks for them and keeps. A hook registered later runs after them: the next
# layer reads what it returns, `hidden_states` of the layer does not have it, and nothing warns. Registered before the
# first forward, or with `prepend=True`, it is seen by both.
# Who meets it: whoever patches or steers the vision tower of a loaded LLaVA, which reads `hidden_states` of a middle
# layer. The patch is dropped without a word once the model has been used.
#
# Needs Python >= 3.10 and a network; works in a temporary folder. Fails if the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 numpy==2.3.5 transformers==5.24.0

cat >hooks.py <<'PY'
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=4)
pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def states(model):
    with torch.no_grad():
        return model(pixels, output_hidden_states=True).hidden_states


def moved(ran_before, prepend):
    """Return how far states 2 and 3 move if a hook adds one to the output of the second layer, which is state 2."""
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
    same = CLIPVisionModel(model.config).eval()
    same.load_state_dict(model.state_dict())
    plain = states(same)
    if ran_before:
        states(model)
    layer = [module for module in model.modules() if type(module).__name__ == "CLIPEncoderLayer"][1]
    layer.register_forward_hook(lambda module, args, output: output + 1, prepend=prepend)
    changed = states(model)
    return [round((changed[i] - plain[i]).abs().max().item(), 3) for i in (2, 3)]


for ran_before in (False, True):
    for prepend in (False, True):
        here, after = moved(ran_before, prepend)
        print(f"the model has run: {ran_before}, prepend={prepend}: the layer's state moves by {here}, the next one by {after}")
        assert after > 0.5, "the next layer always reads what the hook returns"
        assert (here == 0) == (ran_before and not prepend), "the behaviour has changed"
PY
env/bin/python hooks.py
