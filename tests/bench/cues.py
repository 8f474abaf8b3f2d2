"""A knockout whose result is known: what look-alikes need is the cue of their own scene.

    python tests/bench/cues.py runs/demo/bidirectional/trained runs/demo/shuffled/trained

RUNs are solved probes of a world with several scenes in a picture (`make demo`). For each picture and scene, the cues
of that scene or those of the others are hidden from all image tokens, and the probes of the best layer read the scene's
look-alikes. A model with a planted recovery needs its own scene's cues; a shuffled LLM cannot know which are whose.
Prints accuracies and their difference, other cues hidden minus own ones, with a 95% interval over pictures.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights, interval
from llava_bidir.toy_world.canvas import CLASSES
from llava_bidir.toy_world.dialogues import LOOK_ALIKE
from llava_bidir.toy_world.plant import read_pictures
from probes import Knockout, ProbeRun

CONDITIONS = ("nothing", "own cues", "other cues")


@torch.no_grad()
def accuracies(run: ProbeRun) -> Tensor:
    """Return the share of right look-alikes, f64[N, 3]: by picture that has both kinds of cues, and condition."""
    root = Path(run.manifest["data"]["root"])
    pixels, labels = read_pictures(root, "validation")
    patches = json.loads((root / "patches.json").read_text())["validation"]
    scenes, cues = (torch.tensor([entry[key] for entry in patches]) for key in ("scene", "cue"))
    alike = torch.tensor([LOOK_ALIKE[name] != name for name in CLASSES])[labels.clamp(min=0)] & (labels >= 0)
    mllm, site = run.mllm(), run.check_site(None)
    probe = run.probes()[site]
    rows = []
    for scene in range(int(scenes.max()) + 1):
        own, other, asked = cues & (scenes == scene), cues & (scenes != scene), alike & (scenes == scene)
        hidden = (torch.zeros_like(own), own, other)
        right = [probe(mllm.states(pixels, [site], Knockout(b))[site].float()).argmax(-1) == labels for b in hidden]
        valid = own.any(1) & other.any(1) & asked.any(1)
        shares = [(r & asked).sum(1) / asked.sum(1).clamp(min=1) for r in right]
        rows.append(torch.stack(shares, 1).double().masked_fill(~valid[:, None], torch.nan))
    means = torch.stack(rows).nanmean(0)
    return means[means.isfinite().all(1)]


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    for path in parser.parse_args().runs:
        run = ProbeRun(path)
        shares = accuracies(run)
        difference = shares[:, 2] - shares[:, 1]
        resampled = bootstrap_weights(len(shares)).double() @ difference / len(shares)
        low, high = interval(difference.mean().item(), resampled)
        words = [f"{name} {100 * share:.1f}%" for name, share in zip(CONDITIONS, shares.mean(0), strict=True)]
        found = f"{100 * difference.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        label = f"{path}, {run.check_site(None)}, {len(shares)} pictures"
        print(f"{label}: hidden {', '.join(words)}; difference {found}")


if __name__ == "__main__":
    main()
