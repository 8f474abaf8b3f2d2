"""The studies of `probes demo`: of the models with a planted recovery, and of three others."""

from pathlib import Path

from probes.studies.config import StudyConfig
from probes.studies.parser import study_config
from probes.studies.run import run_study

from .steps import MASKS, SCENES

RANDOM_LLMS = ("random0", "random1", "permuted0", "permuted1")
ARMS = ("trained", *RANDOM_LLMS, "adapter0", "adapter1")
LOOK_ALIKES = "ceiling,sky,wall,building,floor,road,bed,car"
ADD = (f"knockout.classes={LOOK_ALIKES}", "knockout.draws=1")
# What no claim needs; it takes half of the time of a small demo.
QUESTIONS = ("routes.limit=80", "routes.draws=1")
EXTRAS = ("patching.limit=100", "patching.draws=1", "maps.classes=ceiling,road", "umap", *QUESTIONS)
TASKS = ("depth", "normals", "boundaries")
# The binding world. The drop, at the encoder and the adapter, has studies of its own.
BINDING_ARMS = ("trained", *RANDOM_LLMS)
BINDING_ADD = (
    "knockout.classes=ceiling,sky,wall,building",
    "knockout.draws=1",
)
# knockouts take half of the time, and no truth is known about them
BINDING_STEPS = ("solve", "fit", "starvation", "report")
SITES = ["adapter", "layer_01", "layer_02", "layer_03", "layer_04"]
PICTURES = f"pictures of {SCENES} scenes"
# Studies whose runs are in the same report, of a folder below OUT, with random LLMs or adapters. Random adapters are
# cheap; two draws judged alone would find effects from four points only (experiments/statistics/statistics.md).
ADAPTERS = tuple(f"adapter{draw}" for draw in range(5))
ADAPTER_SITES = ["encoder", "adapter"]
OTHERS = {
    "shuffled": (RANDOM_LLMS, SITES),
    "merged": (ADAPTERS, ADAPTER_SITES),
    "intact": (ADAPTERS, ADAPTER_SITES),
}


def run_studies(out: Path, settings: dict, extras: bool) -> None:
    """Run the studies of the demo in OUT; the last one writes the report of all.

    Args:
        out: OUT.
        settings: Seed, scale and world of the demo.
        extras: Also run the analyses that no claim needs.
    """
    in_full = extras or settings["scale"] >= 1
    if settings["world"] == "binding":
        studies = [*_other_studies(out, settings), _binding_study(out, settings, in_full)]
    else:
        studies = [_context_study(out, settings, in_full)]
    for study in studies:
        run_study(study, overwrite=True)  # the results of models that were made again


def _context_study(out: Path, settings: dict, in_full: bool) -> StudyConfig:
    """Return the study of both masks in the world of one scene, whose truth is unknown."""
    return study_config(
        {mask: f"{out}/{mask}/stage2/hf" for mask in MASKS},
        f"{out}/assets/segmentation",
        out=out,
        arms=ARMS,
        fit=True,
        tasks=TASKS if in_full else (),
        add=(*ADD, *EXTRAS) if in_full else ADD,
        **_probes(settings, "toy world"),
    )


def _binding_study(out: Path, settings: dict, in_full: bool) -> StudyConfig:
    """Return the study of both models with a planted recovery."""
    return study_config(
        {mask: f"{out}/{mask}/planted/hf" for mask in MASKS},
        f"{out}/assets/segmentation",
        out=out,
        arms=BINDING_ARMS,
        fit=True,
        add=(*BINDING_ADD, *QUESTIONS) if in_full else BINDING_ADD,
        only=None if in_full else BINDING_STEPS,
        **_probes(settings, PICTURES, SITES),
    )


def _other_studies(out: Path, settings: dict) -> list[StudyConfig]:
    """Return the studies of the models in which something else is planted, or nothing."""
    studies = []
    for name, (controls, sites) in OTHERS.items():
        studies.append(
            study_config(
                {"": f"{out}/{name}/hf"},
                f"{out}/assets/segmentation",
                out=out / name,
                arms=("trained", *controls),
                only=("solve",),
                **_probes(settings, PICTURES, sites),
            )
        )
    return studies


def _probes(settings: dict, dataset: str, sites: list[str] | None = None) -> dict:
    """Return config and options of the probes of a study."""
    options = {
        "seed_everything": settings["seed"],
        "data": {"name": dataset},
        "model": {"sites": sites},
    }
    return {"configs": ["demo/probes"], "options": options}
