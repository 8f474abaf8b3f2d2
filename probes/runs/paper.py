"""The paper's numbers."""

import json
from pathlib import Path

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
