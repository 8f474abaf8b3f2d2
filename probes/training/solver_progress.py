"""Files from which a killed `probes solve` goes on: the moments so far, and the points of the refinement.

    RUN/checkpoints/moments_RANK.safetensors    "SITE/count" ... and "seen": the images that one process has added
    RUN/checkpoints/points.safetensors          "SITE/points" f64[P, K, d + 1] and the rest of Problem.state, "passes"

Each process saves its own moments, whenever it likes: sums over images can be added in any number of parts.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llava_bidir.common.atomic_io import atomic_write, write_tensors
from llava_bidir.common.errors import error_context
from llava_bidir.common.identity import Identity, check_same_identity
from llava_bidir.common.run_folder import RESUME_ADVICE

from .moments import Moments
from .optimum import Problem

POINTS = "points.safetensors"


def save(path: Path, tensors: dict[str, Tensor], identity: Identity) -> None:
    """Write tensors with the identity of their run."""
    with atomic_write(path) as partial:
        on_cpu = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        write_tensors(on_cpu, partial, {"identity": json.dumps(identity)})


def load(path: Path, identity: Identity) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Raises:
        UserError: The file is damaged, or belongs to a run of another identity.
    """
    with error_context(path):
        with safe_open(path, "pt") as file:
            saved = json.loads(file.metadata()["identity"])
        tensors = load_file(path)
    check_same_identity(saved, identity, str(path), RESUME_ADVICE)
    return tensors


def moment_files(folder: Path) -> list[Path]:
    """Return the files with moments in a folder of checkpoints."""
    return sorted(folder.glob("moments_*.safetensors"))


def moments_to_tensors(moments: dict[str, Moments], seen: Tensor) -> dict[str, Tensor]:
    """Return the content of a file of moments."""
    named = {f"{site}/{key}": x for site, m in moments.items() for key, x in m.sums().items()}
    return named | {f"{site}/pivot": m.pivot for site, m in moments.items()} | {"seen": seen}


def add_tensors(
    moments: dict[str, Moments], tensors: dict[str, Tensor], sites: Sequence[str], device, kind: type
) -> None:
    """Add the content of a file to moments by site, of the class `kind`."""
    for site in sites:
        if f"{site}/pivot" in tensors:
            saved = kind(**{field.name: tensors[f"{site}/{field.name}"].to(device) for field in fields(kind)})
            moments[site] = saved if site not in moments else _sum(moments[site], saved)


def _sum(a: Moments, b: Moments) -> Moments:
    a.add(b)
    return a


def points_to_tensors(problems: dict[str, list[Problem]], passes: int) -> dict[str, Tensor]:
    """Return the content of the file of points."""
    tensors = {"passes": torch.tensor(passes)}
    for site, by_site in problems.items():
        states = [problem.state() for problem in by_site]
        tensors |= {f"{site}/{key}": torch.stack([state[key] for state in states]) for key in states[0]}
    return tensors


def set_points(problems: dict[str, list[Problem]], tensors: dict[str, Tensor]) -> int:
    """Set the problems to their saved states; return the number of passes behind them."""
    for site, by_site in problems.items():
        saved = {name.removeprefix(f"{site}/"): x for name, x in tensors.items() if name.startswith(f"{site}/")}
        for i, problem in enumerate(by_site):
            problem.set_state({key: x[i] for key, x in saved.items()})
    return int(tensors["passes"])
