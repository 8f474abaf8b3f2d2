"""Messages of libraries about intended behaviour, and advertisements, that both programs leave out."""

import logging
import os
import warnings

import torch

WARNINGS = (
    "LightningCLI's args parameter",
    ".*does not have many workers",
    ".*isinstance.treespec",
    ".*in eval mode",  # the frozen model
    ".*your dataloader is not resumable",  # the data modules restore their position themselves
    "Total length of `list` across ranks is zero",  # no validation questions
    "The `srun` command is available",  # a run on a cluster's login node or inside an allocation
)
LOGGED = {  # by logger: beginnings of messages
    "lightning.pytorch.utilities.rank_zero": (
        "💡 Tip",
        "TPU available",
        "IPU available",
        "HPU available",
    ),
    "transformers.modeling_utils": (
        "The new embeddings will be",
        "The new lm_head weights will be",
    ),
}


class _NoExpectedMessages(logging.Filter):
    """Leave out what a logger says with some beginnings."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(LOGGED[self.name])


FILTERS = [_NoExpectedMessages(name) for name in LOGGED]  # a logger takes each once


def hide_expected_messages() -> None:
    """Leave out the messages above. Others stay: they may be about the user's settings."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for expected in FILTERS:
        logging.getLogger(expected.name).addFilter(expected)
    # a line for each table of each font of a PDF
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # else DeepSpeed warns on stdout that it has to guess
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
