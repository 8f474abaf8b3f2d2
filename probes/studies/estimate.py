"""`probes study --dry-run`: what a study will do, what it costs, and which effects it can find."""

import math

from probes.cli import run_command
from probes.data.registry import DATASETS, open_dataset
from probes.report.verdicts import MARGIN, detectable

from .plan import Settings, check, data_root, make_plan

# Standard deviations in points of mIoU in the toy world (tests/bench/draws.py): of the mean over 600 images, scaled to
# one image, and of random draws. Yours differ; the report states the detectable effects of its own data.
IMAGE_SD, DRAW_SD = 0.28 * math.sqrt(600), 0.35


def print_estimate(settings: Settings) -> None:
    """Print the steps, the time of a pass over the images, disk space, and the effect that can be detected."""
    check(settings)
    steps = make_plan(settings)
    for step in steps:
        print(f"  {step.name}")
    runs = [step for step in steps if step.kind in ("solve", "fit")]
    print(f"{len(steps)} steps, {len(runs)} of them passes over the images")
    dataset = settings.data if settings.data in DATASETS else "folder"
    validation = open_dataset(dataset, data_root(settings), "validation")
    print(f"disk: about {disk_mb(len(validation), len(validation.classes), len(runs)):.0f} MB")
    effect = detectable_effect(len(validation), settings.draws)
    beyond = f"{effect:.1f} points beyond {settings.draws} random draws" if effect else "nothing beyond random draws"
    print(f"{len(validation)} validation images, spread as in the toy world: finds {beyond} in 80% of studies")
    trained = next((step for step in runs if "--model.untrained" not in step.command), None)
    if trained:
        words = [word for word in trained.command if word not in ("--ckpt_path", "last")]
        run_command([*words, "--dry-run"])


def disk_mb(images: int, classes: int, runs: int, sites: int = 40) -> float:
    """Return the size of the counts of all images and of the solved path, with 4 bytes a number."""
    return runs * sites * images * classes * 4 * (3 + 2 * 3 + 1) / 2**20


def detectable_effect(images: int, draws: int) -> float | None:
    """Return the effect in points that is found beyond random draws in 80% of studies; None if it cannot be tested."""
    if draws < 2:
        return None
    half = 1.96 * math.hypot(IMAGE_SD / math.sqrt(images), DRAW_SD * math.sqrt(1 + 1 / draws))
    return 100 * detectable((-half / 100, half / 100), MARGIN)
