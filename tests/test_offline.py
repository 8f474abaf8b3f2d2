"""Nothing is fetched, looked up or reported unless asked. The whole demo is watched in test_demo.py."""

import json
import sys
from pathlib import Path

import network_guard
import pytest
import tiny_models
from processes import run_command

ROOT = Path(__file__).parents[1]
ALL = """
import json, sys
import llava_bidir.cli, probes.cli
from transformers import AutoModelForImageTextToText

for package, *argv in json.loads(sys.argv[1]):
    {"llava_bidir": llava_bidir, "probes": probes}[package].cli.main(argv)
AutoModelForImageTextToText.from_pretrained(sys.argv[2], trust_remote_code=True)
"""


def run_python(log: Path, code: str, *arguments: str) -> None:
    command = [*network_guard.cut(), sys.executable, "-c", code, *arguments]
    run_command(command, cwd=ROOT, env=network_guard.watched(log))


@pytest.mark.parametrize(
    ("code", "noted"),
    [
        (
            "import socket; socket.create_connection(('192.0.2.1', 80), timeout=0.1)",
            "socket.connect 192.0.2.1",
        ),
        (
            "import urllib.request; urllib.request.urlopen('http://host.invalid')",
            "socket.getaddrinfo host.invalid",
        ),
    ],
)
def test_watch_sees_what_is_reached_for(code, noted, tmp_path):
    lines = code.replace("; ", "\n    ")
    run_python(tmp_path / "log", f"try:\n    {lines}\nexcept Exception: pass")
    assert any(line.startswith(noted) for line in network_guard.reached_for(tmp_path / "log"))


@pytest.mark.slow
def test_commands_reach_for_no_network(checkpoints, parts, conversations, segmentation, tmp_path):
    checkpoint = str(checkpoints["bidirectional"])
    picture = str(segmentation / "images/validation/000.png")
    training = tiny_models.training_arguments(parts, conversations)
    commands = [
        ("probes", "sites", checkpoint),
        ("probes", "states", checkpoint, picture, "--out", str(tmp_path / "states.safetensors")),
        ("llava_bidir", "verify-data", *training, "--data.val_annotations", "null"),
        ("llava_bidir", "verify-data", *training, "--show", "0"),
        ("llava_bidir", "fit", *training, "--out", str(tmp_path / "run")),
        f"llava_bidir generate {tmp_path}/run/hf {picture} sky --max-new-tokens 2".split(),
    ]
    run_python(tmp_path / "log", ALL, json.dumps(commands), checkpoint)
    assert network_guard.reached_for(tmp_path / "log") == []
