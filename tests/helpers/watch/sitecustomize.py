"""On PYTHONPATH, notes in the file $NETWORK_LOG whenever a Python process looks up a name or turns to another machine.

It sees what is tried, also where the failure is swallowed, as a telemetry's would be. See network_guard.py.
"""

import os
import sys

HERE = ("127.0.0.1", "::1", "localhost", None)
EVENTS = (
    "socket.connect",
    "socket.sendto",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "urllib.Request",
)


def note(event: str, arguments: tuple) -> None:
    if event not in EVENTS:
        return
    what = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
    if isinstance(what, tuple):
        what = what[0]  # (host, port); a path is a socket between processes of this machine
    elif event in ("socket.connect", "socket.sendto"):
        return
    if what not in HERE:
        with open(os.environ["NETWORK_LOG"], "a") as file:
            file.write(f"{event} {what} by {' '.join(sys.argv[:3])}\n")


sys.addaudithook(note)
