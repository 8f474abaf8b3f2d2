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
from typing import Any

import numpy as np

import probes
from probes.worlds.binding import GRID
from probes.worlds.canvas import CLASSES
from probes.worlds.dialogues import (
    SceneText,
    Turn,
    build_dialogue,
    find_regions,
    is_look_alike,
    prepend_picture,
)
from probes.worlds.plant import read_pictures
from probes.worlds.steps import MASKS, WEIGHTS, make_step, run_in_child_process, to_words

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
    _, labels = read_pictures(folder, split)
    texts = {}
    for file, labels_of_picture in zip(files, labels.tolist(), strict=True):
        names = [CLASSES[max(k, 0)] for k in labels_of_picture]
        texts[str(file.relative_to(folder.parent))] = SceneText(names, "a picture")
    return texts


def write_dialogues(assets: Path, seed: int) -> None:
    """Write the dialogues of arms b to d, and questions about look-alikes."""
    rng = np.random.default_rng([seed, 5])
    texts = read_texts(assets / "llava", "training")
    for arm, options in ARMS.items():
        records = []
        if options is not None:
            for image, text in texts.items():
                turns = build_dialogue(text, rng, **options)
                messages = len(turns)  # of a dialogue
                if arm == "raster":
                    messages = 2
                for start in range(0, len(turns), messages):
                    dialogue = turns[start : start + messages]
                    records.append(make_record(image, start // messages, dialogue))
        (assets / f"{arm}.json").write_text(json.dumps(records))
    asked = []
    val = list(read_texts(assets / "segmentation", "validation").items())
    for i in range(QUESTIONS):
        image, text = val[i % len(val)]
        turns = build_dialogue(text, rng, points=1, look_alikes=True)
        asked.append(make_record(image, i, turns) | {"regions": find_regions(turns)})
    (assets / "look_alikes.json").write_text(json.dumps(asked))


def make_record(image: str, number: int, turns: list[Turn]) -> dict[str, Any]:
    """Return a record of LLaVA's JSON about a picture."""
    return {"id": f"{image} {number}", "image": image, "conversations": prepend_picture(turns)}


def majority_share(assets: Path) -> float:
    """Return the share of questions that the more frequent kind of scene in the picture's look-alikes answers."""
    texts = read_texts(assets / "segmentation", "validation")
    right = []
    for record in json.loads((assets / "look_alikes.json").read_text()):
        names = filter(is_look_alike, texts[record["image"]].names)
        indoor_share = np.mean([name in INDOOR for name in names])
        is_indoor = record["conversations"][1]["value"] in INDOOR
        if indoor_share == 0.5:
            right.append(0.5)
        else:
            right.append((indoor_share > 0.5) == is_indoor)
    return float(np.mean(right))


def train(folder: Path, seed: int, count: int) -> None:
    """Draw the world of a seed and train its eight models, each for `count` steps."""
    assets = folder / "assets"
    world = {"--scenes": 4, "--scale": 0.1, "--seed": seed}
    draw = ["probes", "demo-assets", str(assets), *to_words(world)]
    run_in_child_process(folder, "world", [make_step(folder, draw, assets / "questions.json")])
    if not (assets / "look_alikes.json").exists():
        write_dialogues(assets, seed)
    for mask in MASKS:
        common = {
            "--model.image_attention": mask,
            "--model.encoder.path": assets / "encoder",
            "--model.llm": assets / "llm",
            "--data.images": assets,
            "--seed_everything": seed,
            "--ckpt_path": "last",
        }
        stage1 = folder / mask / "stage1"
        options = common | {"--data.annotations": assets / "captions.json", "--out": stage1}
        fit = ["llava-bidir", "fit", "-c", "demo/stage1", *to_words(options)]
        steps = [make_step(folder, fit, stage1 / WEIGHTS)]
        for arm in ARMS:
            out = folder / mask / arm
            if arm == "tokens":
                command = ["probes", "plant", "recovery"]
                command += [f"{stage1}/hf", str(assets), f"{out}/hf"]
                command += to_words({"--steps": count, "--seed": seed})
            else:
                options = common | {
                    "--data.annotations": assets / f"{arm}.json",
                    "--data.val_annotations": "null",
                    "--trainer.max_epochs": -1,
                    "--trainer.max_steps": count,
                    "--model.adapter": stage1 / "hf",
                    "--out": out,
                }
                command = ["llava-bidir", "fit", "-c", "demo/stage2", *to_words(options)]
            reads = [stage1 / WEIGHTS]
            steps.append(make_step(folder, words=command, result=out / WEIGHTS, reads=reads))
        run_in_child_process(folder, mask, steps)


def study(folder: Path, mask: str, arm: str, seed: int) -> dict:
    """Return recovery and answers of a model, studied beside two random and two permuted LLMs."""
    assets = folder / "assets"
    out = folder / mask / arm / "study"
    options = {"model": {"sites": SITES}, "seed_everything": seed}
    with contextlib.redirect_stdout(io.StringIO()):
        probes.study(
            folder / mask / arm / "hf",
            assets / "segmentation",
            out=out,
            configs=["demo/probes"],
            options=options,
            arms=["trained", "random0", "random1", "permuted0", "permuted1"],
            only=["solve", "routes", "report"],
            add=[
                f"routes.questions={assets}/look_alikes.json",
                "routes.draws=1",
                "routes.window=4",
            ],
        )
    results = json.loads((out / "report/results.json").read_text())
    (claim,) = (claim for claim in results["claims"] if claim["claim"] == "recovery")
    (of_mask,) = results["masks"].values()
    answers = of_mask["routes"]["accuracy"]["value"]
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
    for seed in args.seeds:
        folder = args.out / f"seed{seed}"
        train(folder, seed, args.steps)
        for arm in ("stage1", *ARMS):  # where they start from
            for mask in MASKS:
                result = study(folder, mask=mask, arm=arm, seed=seed)
                majority = majority_share(folder / "assets")
                answers = f"{100 * result['answers']:.1f}% ({100 * majority:.1f}% by majority)"
                print(
                    f"{seed} {arm:<10}{mask:<14}",
                    describe(result["optimum"]),
                    describe(result["beyond_random"]),
                    f"answers {answers}",
                    result["conclusion"],
                    flush=True,
                )


def describe(column: dict[str, Any]) -> str:
    """Return a value and its interval, in points."""
    low, high = column["ci95"]
    return f"{100 * column['value']:+5.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


if __name__ == "__main__":
    main()
