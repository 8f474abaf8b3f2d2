"""A knockout whose result is known: what look-alikes need is the cue of their own scene.

    python -m experiments.toy.cues runs/demo/bidirectional/trained runs/demo/shuffled/trained

RUNs are solved probes of a world with several scenes in a picture (`make demo`). For each picture and scene, the cues
of that scene or those of the others are hidden from all image tokens. Then the probes of the best layer read the
scene's look-alikes, and the model is asked for them, a question each. A model with a planted recovery needs its own
scene's cues, and if it answers from its image tokens, so do its answers; a shuffled LLM cannot know which are whose.
Prints accuracies and their difference, other cues hidden minus own ones, with a 95% interval over pictures.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights, interval
from probes import Knockout, ProbeRun
from probes.worlds.canvas import CLASSES
from probes.worlds.dialogues import ask_patch, is_look_alike
from probes.worlds.plant import read_pictures

CONDITIONS = ("nothing", "own cues", "other cues")


@torch.no_grad()
def accuracies(run: ProbeRun) -> dict[str, Tensor]:
    """Return the shares of look-alikes that the best layer's probe and the answers name rightly, f64[N, 3] each.

    By picture in which a scene has look-alikes, cues of its own and those of others, and by condition.
    """
    root = Path(run.manifest["data"]["root"])
    pixels, labels = read_pictures(root, "validation")
    patches = json.loads((root / "patches.json").read_text())["validation"]
    look_alikes = [k for k, name in enumerate(CLASSES) if is_look_alike(name)]
    alike = torch.isin(labels, torch.tensor(look_alikes))
    mllm = run.mllm()
    site = run.check_site(None)
    probe = run.probes()[site]
    cases = []  # a scene of a picture each, with what the probe reads
    for picture, entry in enumerate(patches):
        scene = torch.tensor(entry["scene"])
        cue = torch.tensor(entry["cue"])
        for number in scene.unique():
            in_scene = scene == number
            asked = alike[picture] & in_scene
            hidden = cue & torch.stack([torch.zeros_like(in_scene), in_scene, ~in_scene])
            if asked.any() and hidden[1:].any(1).all():
                images = pixels[[picture] * len(CONDITIONS)]
                states = mllm.states(images, [site], Knockout(hidden))
                logits = probe(states[site].float())
                cases.append((torch.tensor(picture), asked, hidden, logits.argmax(-1)))
    pictures, asked, hidden, read = map(torch.stack, zip(*cases, strict=True))
    said = read.clone()
    for i, rows in enumerate(asked.T):  # a question to all scenes at once
        if rows.any():
            images = pixels[pictures[rows]].repeat_interleave(len(CONDITIONS), 0)
            knockout = Knockout(hidden[rows].flatten(0, 1))
            scores = mllm.answer_log_probs(
                images, question=ask_patch(i), answers=CLASSES, knockout=knockout
            )
            answers = scores.argmax(-1)
            said[rows, :, i] = answers.view(-1, len(CONDITIONS))
    shares = {}
    for name, named in {f"probe at {site}": read, "answers": said}.items():
        is_right = named == labels[pictures, None]
        right = torch.where(asked[:, None], is_right, torch.nan)
        share = right.nanmean(-1, dtype=torch.double)
        by_picture = [share[pictures == picture].mean(0) for picture in pictures.unique()]
        shares[name] = torch.stack(by_picture)
    return shares


def main() -> None:
    """Print two lines for each run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    for path in parser.parse_args().runs:
        for what, shares in accuracies(ProbeRun(path)).items():
            difference = shares[:, 2] - shares[:, 1]
            resampled = bootstrap_weights(len(shares)).double() @ difference / len(shares)
            mean = difference.mean().item()
            low, high = interval(mean, resampled)
            means = zip(CONDITIONS, shares.mean(0), strict=True)
            listed = ", ".join(f"{name} {100 * share:.1f}%" for name, share in means)
            print(
                f"{path}, {what}, {len(shares)} pictures: hidden {listed}; "
                f"difference {100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            )


if __name__ == "__main__":
    main()
