"""`llava-bidir demo`: train, probe and report on a toy world, on two CPU cores; again: only what is missing.

OUT/assets                  the world, a tiny CLIP and a tiny Llama
OUT/MASK/stage1, stage2     LLaVA's two stages under both masks, two at a time on one thread each
OUT/MASK/ARM, OUT/report    one study of both (probes/studies/README.md)
OUT/logs                    what each step said

Each step is a process. A result that was deleted is made again, and what was made from it.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_bidir.common.atomic_io import read_json, write_files
from llava_bidir.common.errors import UserError
from llava_bidir.common.run_lock import exclusive_run_lock

MASKS = ("causal", "bidirectional")
WORLDS = ("context", "null", "conjunction")
ARMS = "trained random0 random1 adapter0 adapter1"
LOOK_ALIKES = "ceiling,sky,wall,building,floor,road,bed,car"
STUDY = f"--fit --arms {ARMS} --add knockout.classes={LOOK_ALIKES} knockout.draws=1 answers.limit=80 answers.draws=1"
STUDY += " starvation.flip=horizontal,rotate explore"
# What no claim needs; it takes half of the time of a small demo.
EXTRAS = "patching.limit=100 patching.draws=1 maps.classes=ceiling,road umap --tasks depth normals boundaries"
LOG_LINES = 20  # of a step that failed


def run(args: argparse.Namespace) -> None:
    """Run `llava-bidir demo`."""
    out = Path(args.out)
    settings = {"seed": args.seed, "scale": args.scale, "world": args.world}
    with exclusive_run_lock(out, "demo"):
        check_settings(out, settings)
        questions = out / "assets/questions.json"
        run_step(out, "assets", questions, ["llava_bidir", "demo-assets", f"{out}/assets", *_named(settings)])
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda mask: train_stages(out, out / mask, _stages(out, mask, settings), questions), MASKS))
        models = [f"{mask}={out / mask / 'stage2/hf'}" for mask in MASKS]
        study = shlex.split(STUDY)
        if args.extras or args.scale >= 1:
            study += [f"patching.pairs={out}/assets/pairs", *shlex.split(EXTRAS)]
        study += ["-c", "demo/probes", "--seed_everything", str(args.seed)]
        study += ["--data.name", "toy world" if args.world == "context" else f"{args.world} world"]
        run_study(models, out / "assets/segmentation", out, study)


def check_settings(out: Path, settings: dict) -> None:
    """Raise a UserError if OUT holds a result of other settings; else write them down."""
    file = out / "settings.json"
    found = read_json(file) if file.is_file() else settings
    if found != settings:
        text = ", ".join(f"{key} {value}" for key, value in found.items())
        raise UserError(f"{out} holds a demo of {text}; choose another folder (--out), or delete it")
    if not file.is_file():
        write_files({file: settings})


def _named(settings: dict) -> list[str]:
    return to_words({f"--{key}": value for key, value in settings.items()})


def _stages(out: Path, mask: str, settings: dict) -> dict[str, dict]:
    """Return the options of `llava-bidir fit` for both stages."""
    assets = out / "assets"
    common = {"--model.image_attention": mask, "--model.encoder.path": assets / "encoder"}
    common |= {"--model.llm": assets / "llm", "--data.images": assets, "--seed_everything": settings["seed"]}
    stage1 = {"--data.annotations": assets / "captions.json"}
    stage2 = {"--model.adapter": out / mask / "stage1/hf", "--data.annotations": assets / "dialogues.json"}
    stage2 |= {"--data.val_annotations": assets / "questions.json"}
    if settings["world"] == "conjunction":  # two cues that decide together take longer to learn
        stage2["--trainer.max_epochs"] = 4
    return {"stage1": {"-c": "demo/stage1"} | common | stage1, "stage2": {"-c": "demo/stage2"} | common | stage2}


def train_stages(out: Path, folder: Path, stages: dict[str, dict], needed: Path) -> None:
    """Train the stages of a model into FOLDER/STAGE, each unless it is there and newer than what it needs.

    Args:
        out: Folder of the logs.
        folder: Folder of the model, below `out`.
        stages: Options of `llava-bidir fit` by stage.
        needed: What the first stage needs; each other one needs the one before.
    """
    for stage, options in stages.items():
        result = folder / stage / "hf/model.safetensors"
        command = ["llava_bidir", "fit", *to_words(options), "--out", f"{folder}/{stage}"]
        how = ["--overwrite", "true"] if result.is_file() else ["--ckpt_path", "last"]
        run_step(out, "_".join((*folder.relative_to(out).parts, stage)), result, [*command, *how], needed)
        needed = result


def run_study(models: list[str], data: Path, out: Path, options: list[str]) -> None:
    """Run `probes study` and show what it says; results of models that were made again are replaced."""
    command = ["probes", "study", *models, str(data), "--out", str(out), *options, "--overwrite", "true"]
    if subprocess.run([sys.executable, "-m", *command]).returncode:
        raise UserError(f"the study has failed; all it said is in {out / 'study.log'}")


def to_words(options: dict) -> list[str]:
    """Return {"--seed": 0} as ["--seed", "0"]."""
    return [word for key, value in options.items() for word in (key, str(value))]


def run_step(out: Path, name: str, result: Path, command: list[str], needed: Path | None = None) -> None:
    """Run a command unless its result is there and newer than what it needs; its output goes to OUT/logs."""
    if result.is_file() and not (needed and needed.stat().st_mtime > result.stat().st_mtime):
        return
    log, started = out / "logs" / f"{name}.log", time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as said:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", *command], stdout=said, stderr=said, env=environment)
    if done.returncode:
        print("\n".join(log.read_text().splitlines()[-LOG_LINES:]), file=sys.stderr)
        raise UserError(f"{name} has failed; all it said is in {log}")
    print(f"{time.perf_counter() - started:4.0f} s {name}", flush=True)
