"""Messages of other libraries that say nothing about a run; they are filtered by name, and all others are shown."""

import logging
import sys
import warnings

WARNINGS = (  # regular expressions
    "LightningCLI's args parameter is intended",  # its words are those of the command
    r"Found \d+ module\(s\) in eval mode",  # frozen parts are
    "Total length of `list` across ranks is zero",  # there are no validation data
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own call
)
LOGGED = (
    "TPU available",
    "💡 Tip: For seamless cloud",
    "`weights_only` was not set",
    "Setting accelerator to CPU",
)
LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "DeepSpeed",
)


def hide_known_messages() -> None:
    """Filter them from now on, and bars of reading weights where no terminal shows them."""
    for text in WARNINGS:
        warnings.filterwarnings("ignore", text)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(is_news)
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def is_news(record: logging.LogRecord) -> bool:
    """Return whether a message is none of those that are known."""
    return not record.getMessage().startswith(LOGGED)
