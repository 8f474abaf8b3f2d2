"""training.json of an exported model: settings and metrics of its training, and what it was made from."""

from pathlib import Path
from typing import Any

from .atomic_io import read_json

TRAINING_JSON = "training.json"


def read_training(checkpoint: Path) -> dict[str, Any]:
    """Return the training.json of a checkpoint, {} if it has none, as checkpoints that others have released.

    Raises:
        UserError: The file is not JSON.
    """
    file = checkpoint / TRAINING_JSON
    return read_json(file) if file.is_file() else {}
