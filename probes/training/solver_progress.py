"""Files from which a killed `probes solve` resumes, tied to the identity of their run."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llava_bidir.common.atomic_io import atomic_write, write_tensors
from llava_bidir.common.errors import error_context
from llava_bidir.common.identity import Identity, check_same_identity
from llava_bidir.common.run_folder import RESUME_ADVICE


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
        # copies: tensors of a file start at any address, and matrix products round by the alignment of their inputs
        tensors = {name: x.clone() for name, x in load_file(path).items()}
    check_same_identity(saved, identity, str(path), RESUME_ADVICE)
    return tensors
