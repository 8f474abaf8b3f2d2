"""Commands in a network namespace without any interface, and a watch on what their Python processes reach for."""

import os
import subprocess
from pathlib import Path

WATCH = Path(__file__).with_name("watch")
CUT = ["unshare", "--user", "--map-root-user", "--net"]


def cut() -> list[str]:
    """What to put before a command to run it without a network; empty where that is not allowed."""
    try:
        return CUT if subprocess.run([*CUT, "true"], capture_output=True).returncode == 0 else []
    except FileNotFoundError:
        return []


def watched(log: Path) -> dict[str, str]:
    """The environment in which `log` lists what is reached for; nothing in it tells the libraries to stay offline."""
    told = {name for name in os.environ if name.endswith("_OFFLINE")}
    path = os.pathsep.join([str(WATCH), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {name: value for name, value in os.environ.items() if name not in told}
    return {**kept, "PYTHONPATH": path, "NETWORK_LOG": str(log)}


def reached_for(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []
