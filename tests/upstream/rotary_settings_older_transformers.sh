#!/usr/bin/env bash
# Workaround: _add_released_rope in llava_bidir/model/export.py writes both spellings.
#
# A checkpoint that transformers 5 writes loses its rotary settings in transformers 4.57, without a word.
#
# Guess: transformers 4.57.6, which names rotary settings `rope_theta` and `rope_scaling`, reads or rejects the
# `rope_parameters` that 5.24.0 writes; at least it warns of a key that it does not know.
# Found (torch 2.13.0, on a CPU): config.json has `rope_parameters` alone. 4.57.6 keeps it as an attribute that nothing
# reads, takes its defaults (base 10,000, no scaling), and reports nothing. Logits of a random Llama with base 500,000
# differ by more than a tenth of their largest value. A file with both spellings gives equal logits in both versions.
# Who meets it: whoever trains or merges with transformers 5 and serves with software that reads config.json as 4.57 does.
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
import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
rotary = {"rope_type": "default", "rope_theta": 500_000.0}
model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rotary, initializer_range=0.3)).eval()
model.save_pretrained("model")
config = json.load(open("model/config.json"))
print("config.json of 5.24.0:", {k: v for k, v in config.items() if "rope" in k})
model.save_pretrained("both")
json.dump(config | {"rope_theta": 500_000.0}, open("both/config.json", "w"))
torch.save(model(torch.arange(48)[None]).logits, "logits.pt")
PY

cat >read.py <<'PY'
import torch
from transformers import LlamaForCausalLM

expected = torch.load("logits.pt")
for name in ("model", "both"):
    model = LlamaForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    difference = (model(torch.arange(48)[None]).logits - expected).abs().max() / expected.abs().max()
    print(f"4.57.6 reads {name}: base {model.config.rope_theta:,.0f}, logits differ by {difference:.4f} of the largest")
    assert (difference > 0.1) == (name == "model"), "the behaviour has changed"
    assert name == "model" or difference < 1e-5
PY

PYTHONPATH=new env/bin/python write.py 2>progress.txt
PYTHONPATH=old env/bin/python read.py 2>warnings.txt
if grep -i rope warnings.txt; then
  echo "the behaviour has changed: 4.57.6 warns"
  exit 1
fi
