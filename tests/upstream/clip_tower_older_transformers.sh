#!/usr/bin/env bash
# Workaround: released_names in llava_bidir/model/modeling_llava_bidir.py keeps `vision_model.` in exports.
#
# A CLIP tower that transformers 5 writes is drawn at random by transformers 4, in the same class.
#
# Guess: transformers 4.57.6 reads the CLIPVisionModel that 5.24.0 has saved: class, config and shapes are the same.
# Found (torch 2.13.0, on a CPU): 5.24.0 writes the names without `vision_model.`, which it also reads. In 4.57.6, none of
# the names is known: all weights are new, features have nothing in common, and a warning of the
# kind that every new head gets ("newly initialized") is all that tells. Names with the prefix are read by both.
# Who meets it: whoever writes or tunes an encoder with transformers 5 and passes it to software of before, for example
# `--vision_tower` of LLaVA's own train(), which runs on and trains an adapter for random features.
#
# Needs Python >= 3.10 and a network; works in a temporary folder. Fails if the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 numpy==2.3.5
env/bin/python -m pip install -q --target new transformers==5.24.0
env/bin/python -m pip install -q --target old transformers==4.57.6

cat >write.py <<'PY'
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
tower = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
tower.save_pretrained("tower")
tower.config.save_pretrained("prefixed")
weights = {f"vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
save_file(weights, "prefixed/model.safetensors", {"format": "pt"})
features = tower(torch.ones(1, 3, 28, 28)).last_hidden_state
again = CLIPVisionModel.from_pretrained("prefixed").eval()
assert torch.equal(again(torch.ones(1, 3, 28, 28)).last_hidden_state, features)
torch.save(features, "features.pt")
PY

cat >read.py <<'PY'
import torch
from transformers import CLIPVisionModel

expected = torch.load("features.pt")
for name in ("tower", "prefixed"):
    tower, info = CLIPVisionModel.from_pretrained(name, output_loading_info=True)
    difference = (tower.eval()(torch.ones(1, 3, 28, 28)).last_hidden_state - expected).abs().max() / expected.abs().max()
    total = len(tower.state_dict())
    print(f"4.57.6 reads {name}: {len(info['missing_keys'])} of {total} weights are new, features differ by {difference:.3f}")
    assert (difference > 0.1) == (name == "tower"), "the behaviour has changed"
    assert name == "tower" or difference < 1e-5
PY

PYTHONPATH=new env/bin/python write.py 2>progress.txt
PYTHONPATH=old env/bin/python read.py 2>warnings.txt
grep -q "newly initialized" warnings.txt
