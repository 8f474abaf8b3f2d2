"""Lock a folder or a file so that one process at a time writes it."""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError

log = logging.getLogger(__name__)

EXITING_S = 1.0  # what a process that is exiting may take
NO_LOCK_SUPPORT = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def exclusive_run_lock(
    folder: Path, result: str = "", wait_s: float | None = None
) -> Iterator[None]:
    """Hold the lock FOLDER/.lock, or FOLDER/.RESULT.lock for a single result, while the block runs.

    It waits `wait_s` seconds for another process, by default as long as one that is exiting may take. The OS releases
    the lock when the process exits, even after SIGKILL; a stale lock file does not block later runs.

    Raises:
        UserError: Another process holds the lock (the message names the process), or the folder is not writable.
    """
    file = folder / (f".{result}.lock" if result else ".lock")
    timeout = EXITING_S if wait_s is None else wait_s
    lock = FileLock(file, timeout=timeout, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        file.write_text(
            f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n"
        )
    except Timeout:
        raise UserError(
            f"{folder / result} is in use by {_lock_holder(file)}; wait until it has ended, or write to another folder"
        ) from None
    except OSError as error:
        lock.release()
        if error.errno not in NO_LOCK_SUPPORT:
            raise UserError(
                f"cannot write to folder {folder}: {error.strerror}; choose another folder"
            ) from None
        log.warning(
            "the file system of %s does not support locks: a second run in it is not prevented",
            folder,
        )
    try:
        yield
    finally:
        with suppress(OSError):
            # while the lock is held: filelock checks that the locked file still exists
            file.unlink()
        lock.release()


def _lock_holder(file: Path) -> str:
    """Return the text that the holder of the lock wrote."""
    try:
        return file.read_text().strip() or "a process that just started"
    except OSError:
        return "a process that just ended"
