"""The files from which a killed run of `probes solve` resumes; they are deleted when it has ended."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llava_bidir.common.atomic_io import atomic_write, write_tensors
from llava_bidir.common.errors import error_context
from llava_bidir.common.identity import Identity, check_same_identity
from llava_bidir.common.run_folder import RESUME_ADVICE


class SolverCheckpoints:
    """Files of tensors in a folder, each with the identity of its run.

    Args:
        folder: RUN/checkpoints.
        identity: Of this run; None where nothing is saved.
        resuming: Files of a killed run may be read.
    """

    def __init__(self, folder: Path, identity: Identity | None, resuming: bool):
        self.folder = folder
        self.identity = identity
        self.resuming = resuming

    def has(self, name: str) -> bool:
        """Return whether a killed run has left a file that this run may read."""
        return self.resuming and (self.folder / name).is_file()

    def names(self, pattern: str) -> list[str]:
        """Return the names of the files that a killed run has left."""
        return sorted(file.name for file in self.folder.glob(pattern)) if self.resuming else []

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors to a file, with the identity of the run."""
        with atomic_write(self.folder / name) as partial:
            on_cpu = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
            write_tensors(on_cpu, partial, {"identity": json.dumps(self.identity)})

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file.

        Raises:
            UserError: The file is damaged, or belongs to a run of another identity.
        """
        path = self.folder / name
        with error_context(path):
            with safe_open(path, "pt") as file:
                saved = json.loads(file.metadata()["identity"])
            # in memory of torch: products of tensors at the addresses of a mapped file can differ in their last bits
            tensors = {key: x.clone() for key, x in load_file(path).items()}
        check_same_identity(saved, self.identity, str(path), RESUME_ADVICE)
        return tensors


def tensors_of(site: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a site by name, from those of all sites by "SITE/NAME"."""
    return {name.partition("/")[2]: x for name, x in tensors.items() if name.startswith(f"{site}/")}
