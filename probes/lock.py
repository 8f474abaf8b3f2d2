"""One process at a time writes a result."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def only_writer(folder: Path, result: str = "") -> Iterator[None]:
    """Holds a folder, or one result in it, for as long as this process writes there.

    The system lets go of it when the process ends, in whatever way: the file that a killed one leaves, FOLDER/.lock or
    FOLDER/.RESULT.lock, keeps nobody out.

    Raises:
        ValueError: Another process holds it; the message says which. Or nothing can be written there.
    """
    file = folder / (f".{result}.lock" if result else ".lock")
    lock = FileLock(file, blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        file.write_text(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
    except Timeout:
        who = file.read_text() if file.is_file() else "another process, which just ended"
        raise ValueError(f"{folder / result} is in use by {who}; wait until it ends, or write elsewhere") from None
    except OSError as error:
        lock.release()
        raise ValueError(f"nothing can be written into {folder} ({error.strerror}); give another --out") from None
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # while it is held: filelock looks whether what it locked is still there
        lock.release()
