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
from probes.worlds.dialogues import LOOK_ALIKE, ask_patch
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
    alike = torch.tensor([LOOK_ALIKE[name] != name for name in CLASSES])[labels.clamp(min=0)] & (
        labels >= 0
    )
    mllm = run.mllm()
    site = run.check_site(None)
    probe = run.probes()[site]
    shares: dict[str, list[Tensor]] = {f"probe at {site}": [], "answers": []}
    for picture, entry in enumerate(patches):
        scene, cue = (torch.tensor(entry[key]) for key in ("scene", "cue"))
        rows = {name: [] for name in shares}
        for number in range(int(scene.max()) + 1):
            own = cue & (scene == number)
            other = cue & (scene != number)
            asked = (alike[picture] & (scene == number)).nonzero()[:, 0]
            if not (own.any() and other.any() and len(asked)):
                continue
            images = pixels[picture].expand(len(CONDITIONS), -1, -1, -1)
            right = labels[picture, asked]
            knockout = Knockout(torch.stack([torch.zeros_like(own), own, other]))
            read = probe(mllm.states(images, [site], knockout)[site].float())[:, asked]
            answers = [
                mllm.answer_log_probs(images, ask_patch(int(i)), CLASSES, knockout) for i in asked
            ]
            said = torch.stack(answers, 1)
            for name, scores in zip(rows, (read, said), strict=True):
                rows[name].append((scores.argmax(-1) == right).double().mean(1))
        for name, values in rows.items():
            shares[name] += [torch.stack(values).mean(0)] if values else []
    return {name: torch.stack(values) for name, values in shares.items()}


def main() -> None:
    """Print two lines for each run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    for path in parser.parse_args().runs:
        for what, shares in accuracies(ProbeRun(path)).items():
            difference = shares[:, 2] - shares[:, 1]
            resampled = bootstrap_weights(len(shares)).double() @ difference / len(shares)
            low, high = interval(difference.mean().item(), resampled)
            words = [
                f"{name} {100 * share:.1f}%"
                for name, share in zip(CONDITIONS, shares.mean(0), strict=True)
            ]
            found = f"{100 * difference.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            print(
                f"{path}, {what}, {len(shares)} pictures: hidden {', '.join(words)}; difference {found}"
            )


if __name__ == "__main__":
    main()
