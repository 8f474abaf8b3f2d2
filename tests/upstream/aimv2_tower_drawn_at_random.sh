#!/usr/bin/env bash
# Workaround: probes/models/families/encoders.py reads `aimv2_vision_model` alone, not checkpoints of both towers.
#
# The vision tower of a two-tower AIMv2, loaded alone, has random weights; that of CLIP, SigLIP, MetaCLIP 2 and TIPSv2 not.
#
# Guess: XVisionModel.from_pretrained of a checkpoint of both towers loads the vision tower, as it does for CLIP, and a
# class that could not would raise an error.
# Found (transformers 5.24.0, torch 2.13.0, on a CPU): Aimv2VisionModel takes none of the weights of the checkpoint. All of
# its own are missing and drawn anew, those of the tower are listed as unexpected, which the load report calls harmless
# for another architecture, and the model is returned. Its states have nothing to do with the tower's. The four other
# classes, called in the same way, equal the tower to the last bit.
# Who meets it: whoever takes features of AIMv2 (the LiT checkpoint has both towers) as they take those of CLIP. A linear
# probe then scores a random encoder.
#
# Needs Python >= 3.10 and a network; works in a temporary folder. Fails if the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 numpy==2.3.5 transformers==5.24.0

cat >towers.py <<'PY'
import tempfile

import torch
import transformers

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
transformers.logging.set_verbosity_error()

for name in ("CLIP", "Siglip", "MetaClip2", "Tipsv2", "Aimv2"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vision_config={**SIZES, "image_size": 28, "patch_size": 14}, text_config={**SIZES, "vocab_size": 99}
    )
    both = getattr(transformers, f"{name}Model")(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        both.save_pretrained(folder)
        tower = getattr(transformers, f"{name}VisionModel")
        alone, report = tower.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        expected = both.vision_model(PIXELS).last_hidden_state
        found = alone.eval()(PIXELS).last_hidden_state
    missing = len(report["missing_keys"])
    print(f"{name}: weights missing {missing}, states equal: {torch.equal(found, expected)}")
    assert (missing > 0) == (name == "Aimv2"), "the behaviour has changed"
    assert torch.equal(found, expected) == (name != "Aimv2"), "the behaviour has changed"
PY
env/bin/python towers.py
