"""python alone.py FOLDER COMMAND ...: runs a command unless another one, started so, is at work in the folder."""

import subprocess
import sys
from pathlib import Path

from llava_bidir.common.run_lock import exclusive_run_lock

try:
    with exclusive_run_lock(Path(sys.argv[1])):
        sys.exit(subprocess.call(sys.argv[2:]))
except ValueError as error:
    sys.exit(str(error))
