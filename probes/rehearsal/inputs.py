"""Inputs of a rehearsal: models in their published layouts, LLaVA records with pictures, and a folder like ADE20K's."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from llava_bidir.common.atomic_io import atomic_directory

from .published import SIZES, write_encoder, write_llava_hf, write_vicuna

PICTURE_PX = (480, 640)  # about that of COCO, from which most of LLaVA's pictures are
QUESTION = "What is in this picture, and what is beside it?"
ANSWER = "The picture has three areas in different colours. " * 6
COLOURS = np.array([[120, 120, 120], [180, 200, 230], [80, 50, 30]])
# ADE20K's numbers of wall, sky and ceiling. Sky and ceiling look alike here, so that probes mistake some patches and
# the knockout has cases.
CLASSES = (1, 3, 6)
STEPS = 2  # optimizer steps of each stage; the first one also compiles and allocates
RECORDS = STEPS * 256  # as many as these steps need under configs/stage1.yaml
PICTURES = 16
# Of `probes study`: two LLMs of each control, the fewest with a verdict, and no more images than it needs. As at the
# real size, the states of all images do not fit: the memory of two is the least for two folds. Passes end when the
# certificates hold.
KEPT = 2  # images whose memory the solver may use
PROBED = 2  # images per batch of the probes; there are fewer than the config's batch has
ARMS = "trained random0 random1 permuted0 permuted1"
STUDY = f"-c ade20k --data.batch_size {PROBED} --data.num_workers 1 --trainer.max_epochs 1"
STUDY += " --trainer.log_every_n_steps 1 --fit --passes 10 --folds 2 --strengths 0.1"
STUDY += f" --sample-images {KEPT}"
STUDY += " --add knockout.classes=auto:2 knockout.limit=1 knockout.draws=1"


def write_inputs(out: Path, size: str, encoder: str, training_images: int) -> None:
    """Write all inputs of a rehearsal into the folder `out`, complete or not at all.

    Args:
        out: Folder; `out/env.sh` sets the paths for slurm/env.sh.
        size: Key of SIZES.
        encoder: clip, dinov2 or siglip.
        training_images: Images that the probes train on.
    """
    settings = SIZES[size]
    with atomic_directory(out, marker="env.sh") as folder:
        write_vicuna(settings.llm, folder / "vicuna")
        write_encoder(encoder, settings.encoders_shrink, folder / encoder)
        write_llava_hf(
            settings.llm, settings.encoders_shrink, folder / "vicuna", folder / "llava-hf"
        )
        write_conversations(folder)
        write_segmentation(
            folder / "ade/ADEChallengeData2016", training_images, settings.validation_images
        )
        (folder / "env.sh").write_text(slurm_settings(out.resolve(), encoder))
        config = {"model": {"encoder": {"name": encoder, "path": str(out.resolve() / encoder)}}}
        (folder / f"{encoder}.yaml").write_text(json.dumps(config) + "\n")


def write_conversations(folder: Path) -> None:
    """Write captions (stage 1), dialogues (stage 2) and questions (benchmarks) about random pictures."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(PICTURES):
        pixels = rng.integers(0, 255, (PICTURE_PX[0] // 16, PICTURE_PX[1] // 16, 3), np.uint8)
        Image.fromarray(pixels).resize(PICTURE_PX[::-1]).save(folder / f"pictures/{i:06d}.jpg")

    def write_records(
        name: str,
        question: str,
        answer: str,
        count: int = RECORDS,
    ) -> None:
        turns = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ]

        def picture(i):
            return f"pictures/{i % PICTURES:06d}.jpg"

        rows = [
            {
                "id": f"{i:06d}",
                "image": picture(i),
                "conversations": turns,
            }
            for i in range(count)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))

    write_records("captions", "Describe it.", "Three areas.")
    write_records("dialogues", QUESTION, ANSWER)
    write_records("questions", QUESTION, "Three areas.", count=2)


def write_segmentation(root: Path, training: int, validation: int) -> None:
    """Write images of three areas and their masks, in ADE20K's layout."""
    rng = np.random.default_rng(1)
    for split, count, prefix in (
        ("training", training, "train"),
        ("validation", validation, "val"),
    ):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(1, count + 1):
            kinds = np.zeros(PICTURE_PX, np.uint8)
            kinds[: rng.integers(160, 320)] = rng.integers(1, 3)  # sky or ceiling above a wall
            kinds[:160, rng.integers(200, 440) :] = rng.integers(1, 3)
            pixels = COLOURS[np.minimum(kinds, 1)] + rng.integers(-20, 20, (*PICTURE_PX, 3))
            name = f"ADE_{prefix}_{i:08d}"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                root / f"images/{split}/{name}.jpg"
            )
            Image.fromarray(np.array(CLASSES, np.uint8)[kinds]).save(
                root / f"annotations/{split}/{name}.png"
            )


def slurm_settings(folder: Path, encoder: str) -> str:
    """Return the lines that, after slurm/env.sh, make slurm/six_configurations.sh run a few steps on this folder."""
    settings = {
        "ENCODERS": encoder,
        "ENCODER_CONFIGS": folder,
        "LLM": folder / "vicuna",
        "CAPTIONS": folder / "captions.json",
        "CAPTION_IMAGES": folder,
        "INSTRUCTIONS": folder / "dialogues.json",
        "INSTRUCTION_IMAGES": folder,
        "SEGMENTATION": folder / "ade/ADEChallengeData2016",
        "STAGE1": f"$STAGE1 --trainer.max_steps {STEPS}",
        "STAGE2": f"$STAGE2 --trainer.max_steps {STEPS}",
        "LAYOUT": "ade20k",
        "ARMS": ARMS,
        "STUDY": STUDY,
        "VQA": f"--tasks toy --data {folder}",
    }
    return "".join(f'export {key}="{value}"\n' for key, value in settings.items())
