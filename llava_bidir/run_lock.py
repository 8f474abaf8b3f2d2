"""One process at a time writes in a folder."""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def locked(folder: Path, lock: Path) -> Iterator[None]:
    """Keeps other processes that ask for it out of `folder` while inside. The lock is the kernel's and ends with the
    process, however that ends: a killed one leaves a file, which locks nothing.

    Args:
        folder: What messages call it.
        lock: The file that is locked; it says by whom. Its folder is made.

    Raises:
        ValueError: Another process holds the lock, or nothing can be written there.
    """
    held = FileLock(lock, fallback_to_soft=False)  # a soft one would be left behind by a kill
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=1)  # for a process that is just ending
    except Timeout:
        raise ValueError(
            f"{folder} is in use by {_holder(lock)}; wait until it has ended, or end it, or write to another folder"
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise ValueError(f"{folder} cannot be written: {error}; choose another folder") from error
        log.warning("%s: this file system has no locks, so nothing keeps a second run out of it", folder)
        yield
        return
    try:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        lock.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is free: whoever waits for this file then sees that it is gone
        held.release()


def _holder(lock: Path) -> str:
    try:
        return lock.read_text().strip() or "another process"
    except OSError:  # it has just ended
        return "another process"
