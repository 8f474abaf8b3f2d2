"""One process at a time writes a result."""

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

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def exclusive_run_lock(folder: Path, result: str = "") -> Iterator[None]:
    """Holds a folder, or one result in it, for as long as this process writes there.

    The system lets go of it when the process ends, in whatever way: the file that a killed one leaves, FOLDER/.lock or
    FOLDER/.RESULT.lock, keeps nobody out.

    Raises:
        UserError: Another process holds it; the message says which. Or nothing can be written there.
    """
    file = folder / (f".{result}.lock" if result else ".lock")
    lock = FileLock(file, timeout=1, fallback_to_soft=False)  # a second for one that is just ending
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        file.write_text(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
    except Timeout:
        raise UserError(
            f"{folder / result} is in use by {_holder(file)}; wait until that has ended, or write to another folder"
        ) from None
    except OSError as error:
        lock.release()
        if error.errno not in WITHOUT_LOCKS:
            raise UserError(f"nothing can be written into {folder}: {error.strerror}; choose another folder") from None
        log.warning("the file system of %s has no locks: nothing keeps a second run out of it", folder)
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # while it is held: filelock looks whether what it locked is still there
        lock.release()


def _holder(file: Path) -> str:
    try:
        return file.read_text().strip() or "a process that just started"
    except OSError:
        return "a process that just ended"
