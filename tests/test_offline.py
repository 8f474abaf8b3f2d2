"""Nothing is fetched, looked up or reported unless asked. The whole demo is watched in test_demo.py."""

import json
import subprocess
import sys
from pathlib import Path

import network_guard
import pytest
import tiny_models
from processes import HANGING_S

ROOT = Path(__file__).parents[1]
ALL = """
import json, sys
import llava_bidir.cli, probes.cli
from transformers import AutoModelForImageTextToText

for package, *argv in json.loads(sys.argv[1]):
    {"llava_bidir": llava_bidir, "probes": probes}[package].cli.main(argv)
AutoModelForImageTextToText.from_pretrained(sys.argv[2], trust_remote_code=True)
"""


def python(log: Path, code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [*network_guard.cut(), sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=network_guard.watched(log),
        capture_output=True,
        text=True,
        timeout=HANGING_S,
    )


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
    done = python(
        tmp_path / "log",
        f"try:\n    {code.replace('; ', chr(10) + '    ')}\nexcept Exception: pass",
    )
    assert done.returncode == 0, done.stderr
    assert any(line.startswith(noted) for line in network_guard.reached_for(tmp_path / "log"))


def test_a_cut_network_has_no_way_out():
    if not network_guard.cut():
        pytest.skip("network namespaces are not allowed here")
    routes = subprocess.run(
        [*network_guard.cut(), "cat", "/proc/net/route"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(routes.stdout.splitlines()) <= 1, "at most a heading"


@pytest.mark.slow
def test_commands_reach_for_no_network(
    checkpoints,
    parts,
    conversations,
    segmentation,
    tmp_path,
):
    checkpoint = str(checkpoints["bidirectional"])
    picture = str(segmentation / "images/validation/000.png")
    training = tiny_models.training_arguments(parts, conversations)
    commands = [
        ("probes", "sites", checkpoint),
        ("probes", "states", checkpoint, picture, "--out", str(tmp_path / "states.safetensors")),
        ("llava_bidir", "verify-data", *training),
        ("llava_bidir", "inspect", *training),
        ("llava_bidir", "fit", *training, "--out", str(tmp_path / "run")),
        (
            "llava_bidir",
            "generate",
            str(tmp_path / "run/hf"),
            picture,
            "sky",
            "--max-new-tokens",
            "2",
        ),
    ]
    done = python(tmp_path / "log", ALL, json.dumps(commands), checkpoint)
    assert done.returncode == 0, done.stderr[-3000:]
    assert network_guard.reached_for(tmp_path / "log") == []
