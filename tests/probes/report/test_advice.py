"""The commands that a report advises, followed through a shell, make runs that the report accepts."""

import re
import subprocess

import solving

from probes.cli import main
from probes.data.folder import FolderDataset
from probes.data.registry import DATASETS
from probes.report.claims import evaluate_claims
from probes.results.study import read_studies

SETTINGS = {
    "--data.name": "photos of 'mine'",
    "--data.dataset": "mine",
    "--data.options": '{"note": "a \'b\' c"}',
    "--seed_everything": "3",
    "--model.image_resize": "pad",
    "--model.dtype": "float32",
    "--model.prefix": "USER: it's `this`\n",
}


class Mine(FolderDataset):
    """A layout with an option."""

    def __init__(self, root, split, note: str = ""):
        super().__init__(root, split)


def advised(studies) -> set[str]:
    """Return the commands that make runs which the claims lack."""
    reasons = [
        column.get("reason", "")
        for study in studies
        for claim in evaluate_claims(study)
        for column in claim["verdicts"].values()
    ]
    commands = {
        command
        for reason in reasons
        for command in re.findall(r"(?s)run `(probes (?:solve|fit) .*? --out RUN)`", reason)
    }
    drawn = [
        command
        for reason in reasons
        for command in commands
        if f"{command}`, and the same" in reason
    ]
    return commands | {command.replace("model.draw 0", "model.draw 1") for command in drawn}


def follow(command: str) -> list[str]:
    """Return the words that the program gets from a shell."""
    script = f"probes() {{ printf '%s\\0' \"$@\"; }}; {command}"
    said = subprocess.run(["bash", "-c", script], capture_output=True, check=True, text=True)
    return said.stdout.split("\0")[:-1]


def test_advised_commands_make_runs_that_the_report_accepts(
    checkpoints,
    segmentation,
    tmp_path,
    monkeypatch,
):
    """The first run was made with a config and settings of its own, which the commands repeat."""
    monkeypatch.setitem(DATASETS, "mine", Mine)
    settings = [word for setting in SETTINGS.items() for word in setting]
    runs = [str(tmp_path / "trained")]
    main(solving.arguments(checkpoints["causal"], segmentation, runs[0], *settings))
    commands = advised(read_studies(runs))
    assert len(commands) == 7, "the recipe, two draws of both kinds of LLMs and of an adapter"
    for number, command in enumerate(sorted(commands)):
        words = follow(command.replace("RUN", str(tmp_path / f"run{number}")))
        if words[0] == "fit":  # the paper's recipe, in two steps
            words += (
                "--trainer.max_steps 2 --trainer.val_check_interval 1 --data.num_workers 0".split()
            )
        main(words)
        runs.append(words[-1] if words[0] == "solve" else str(tmp_path / f"run{number}"))
    (study,) = read_studies(runs)
    assert advised([study]) == set()
