"""Experiment 5 of the toy world: does an LLM that is trained on questions refine image tokens?

    python -m experiments.toy.supervision --seeds 0 1 2

The design is in experiments/toy/toy_results.md. For each seed and mask, a model after stage 1 is trained in four ways,
with as many optimizer steps on the same pictures:

    a tokens     the class of each image token (`probes plant recovery`)
    b questions  dialogues that ask for all 64 patches in random order
    c raster     the labels of all patches as text, a row in a dialogue of its own
    d captions   a caption with all classes of the picture

OUT/seedN/MASK/ARM/hf are the models, OUT/seedN/MASK/ARM/study their studies with two draws of both kinds. What is there
is not made again. Prints recovery at the optimum and beyond random, and the share of right answers to 400 questions
about look-alikes.
"""

import argparse
import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np

import probes
from probes.worlds.binding import GRID
from probes.worlds.canvas import CLASSES
from probes.worlds.dialogues import (
    LOOK_ALIKE,
    SceneText,
    build_dialogue,
    find_regions,
    prepend_picture,
)
from probes.worlds.plant import read_pictures
from probes.worlds.steps import MASKS, WEIGHTS, make_step, run_in_child_process

ARMS = {
    "tokens": None,
    "questions": {"points": GRID**2},
    "raster": {"rows": GRID},
    "captions": {"caption": True},
}
QUESTIONS = 400
SITES = ["adapter", "layer_01", "layer_02", "layer_03", "layer_04"]
INDOOR = {"ceiling", "wall", "floor", "bed"}


def read_texts(folder: Path, split: str) -> dict[str, SceneText]:
    """Return the class of each patch in words, by the picture's path below `folder`'s parent."""
    files = sorted((folder / "images" / split).glob("*.png"))
    names = [
        [CLASSES[max(k, 0)] for k in labels] for labels in read_pictures(folder, split)[1].tolist()
    ]
    return {
        str(file.relative_to(folder.parent)): SceneText(n, "a picture")
        for file, n in zip(files, names, strict=True)
    }


def write_dialogues(assets: Path, seed: int) -> None:
    """Write the dialogues of arms b to d, and questions about look-alikes."""
    rng = np.random.default_rng([seed, 5])
    texts = read_texts(assets / "llava", "training")
    for arm, options in ARMS.items():
        records = []
        for image, text in texts.items() if options else ():
            turns = build_dialogue(text, rng, **options)
            each = 2 if arm == "raster" else len(turns)  # messages of a dialogue
            parts = [turns[i : i + each] for i in range(0, len(turns), each)]
            records += [{"id": f"{image} {i}", "image": image, "conversations": prepend_picture(part),}
                        for i, part in enumerate(parts)]  # fmt: skip
        (assets / f"{arm}.json").write_text(json.dumps(records))
    asked = []
    val = list(read_texts(assets / "segmentation", "validation").items())
    for i in range(QUESTIONS):
        image, text = val[i % len(val)]
        turns = build_dialogue(text, rng, points=1, look_alikes=True)
        asked.append(
            {
                "id": f"{image} {i}",
                "image": image,
                "conversations": prepend_picture(turns),
                "regions": find_regions(turns),
            }
        )
    (assets / "look_alikes.json").write_text(json.dumps(asked))


def majority_share(assets: Path) -> float:
    """Return the share of questions that the more frequent kind of scene in the picture's look-alikes answers."""
    texts = read_texts(assets / "segmentation", "validation")
    right = []
    for record in json.loads((assets / "look_alikes.json").read_text()):
        kinds = [
            name in INDOOR for name in texts[record["image"]].names if LOOK_ALIKE[name] != name
        ]
        share = np.mean(kinds)
        right.append(
            0.5
            if share == 0.5
            else (share > 0.5) == (record["conversations"][1]["value"] in INDOOR)
        )
    return float(np.mean(right))


def train(folder: Path, seed: int, count: int) -> None:
    """Draw the world of a seed and train its eight models, each for `count` steps."""
    assets = folder / "assets"
    world = ["--scenes", 4, "--scale", 0.1, "--seed", seed]
    draw = words("probes", "demo-assets", assets, *world)
    run_in_child_process(folder, "world", [make_step(folder, draw, assets / "questions.json")])
    if not (assets / "look_alikes.json").exists():
        write_dialogues(assets, seed)
    for mask in MASKS:
        parts = ["--model.encoder.path", assets / "encoder", "--model.llm", assets / "llm"]
        common = [
            "--model.image_attention",
            mask,
            *parts,
            "--data.images",
            assets,
            "--seed_everything",
            seed,
            "--ckpt_path",
            "last",
        ]
        stage1 = folder / mask / "stage1"
        captions = ["--data.annotations", assets / "captions.json"]
        fit = words("llava-bidir", "fit", "-c", "demo/stage1", *common, *captions, "--out", stage1)
        steps = [make_step(folder, fit, stage1 / WEIGHTS)]
        for arm, options in ARMS.items():
            out = folder / mask / arm
            data = ["--data.annotations", assets / f"{arm}.json", "--data.val_annotations", "null"]
            length = [
                "--trainer.max_epochs",
                -1,
                "--trainer.max_steps",
                count,
                "--model.adapter",
                stage1 / "hf",
            ]
            command = words(
                "llava-bidir", "fit", "-c", "demo/stage2", *common, *data, *length, "--out", out
            )
            if options is None:
                models = stage1 / "hf", assets, out / "hf"
                command = words(
                    "probes", "plant", "recovery", *models, "--steps", count, "--seed", seed
                )
            steps.append(
                make_step(folder, words=command, result=out / WEIGHTS, reads=[stage1 / WEIGHTS])
            )
        run_in_child_process(folder, mask, steps)


def words(*parts: object) -> list[str]:
    return [str(part) for part in parts]


def study(folder: Path, mask: str, arm: str, seed: int) -> dict:
    """Return recovery and answers of a model, studied beside two random and two permuted LLMs."""
    assets = folder / "assets"
    out = folder / mask / arm / "study"
    options = {"model": {"sites": SITES}, "seed_everything": seed}
    with contextlib.redirect_stdout(io.StringIO()):
        probes.study(
            folder / mask / arm / "hf", assets / "segmentation", out=out, configs=["demo/probes"], options=options,
            arms=["trained", "random0", "random1", "permuted0", "permuted1"], only=["solve", "routes", "report"],
            add=[f"routes.questions={assets}/look_alikes.json", "routes.draws=1", "routes.window=4"],
        )  # fmt: skip
    found = json.loads((out / "report/results.json").read_text())
    (claim,) = (claim for claim in found["claims"] if claim["claim"] == "recovery")
    answers = next(iter(found["masks"].values()))["routes"]["accuracy"]["value"]
    columns = {name: claim["verdicts"][name] for name in ("optimum", "beyond_random")}
    return columns | {"answers": answers, "conclusion": claim["conclusion"]}


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/supervision"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each model")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def points(c):
        return f"{100 * c['value']:+5.1f} [{100 * c['ci95'][0]:+.1f}, {100 * c['ci95'][1]:+.1f}]"

    for seed in args.seeds:
        folder = args.out / f"seed{seed}"
        train(folder, seed, args.steps)
        for arm in ("stage1", *ARMS):  # where they start from
            for mask in MASKS:
                found = study(folder, mask=mask, arm=arm, seed=seed)
                numbers = [points(found[name]) for name in ("optimum", "beyond_random")]
                answers = f"{100 * found['answers']:.1f}% ({100 * majority_share(folder / 'assets'):.1f}% by majority)"
                print(
                    f"{seed} {arm:<10}{mask:<14}",
                    *numbers,
                    f"answers {answers}",
                    found["conclusion"],
                    flush=True,
                )


if __name__ == "__main__":
    main()
