"""The syntax of real commands: flags, lists, short names, words without a name, values that begin with "-"."""

import shlex
from operator import attrgetter

import pytest
from jsonargparse import Namespace

import llava_bidir.cli
import probes.cli
from llava_bidir.command_options import COMMANDS as OF_TRAINING
from llava_bidir.common.cli import Parser
from llava_bidir.common.lightning_cli import RunCLI

MAIN = {"llava-bidir": llava_bidir.cli.main, "probes": probes.cli.main}
COMMANDS = {
    (program, name): command
    for program, groups in (("llava-bidir", OF_TRAINING), ("probes", probes.cli.commands()))
    for group in groups.values()
    for name, command in group.items()
}
SITES = ["layer_01", "layer_02"]
SOLVE = "probes solve --model.mllm M --data.root D"
FIT = "probes fit --model.mllm M --data.root D"
CASES = {  # words: what they mean
    # booleans: alone or in any case, and nothing else is taken for one
    "probes knockout RUN --classes a --overwrite": {"overwrite": True},
    "probes knockout RUN --classes a --overwrite True": {"overwrite": True},
    "probes knockout RUN --classes a --overwrite=TRUE": {"overwrite": True},
    "probes study M D --out R --fit False": {"fit": False, "inputs": ["M", "D"]},
    "probes study --fit no M D --out R": {"fit": False, "inputs": ["M", "D"]},
    "probes study --fit M D --out R": {"fit": True, "inputs": ["M", "D"]},
    "probes study M --dry-run D --out R": {"dry_run": True, "inputs": ["M", "D"]},
    "llava-bidir export --as-llava RUN DIR": {"as_llava": True, "source": "RUN", "out": "DIR"},
    f"{FIT} --overwrite --save_predictions TRUE": {"overwrite": True, "save_predictions": True},
    # lists: with spaces up to the next option, with commas, or as in YAML
    f"{SOLVE} --model.sites layer_01 layer_02 --out R": {"model.sites": SITES, "out": "R"},
    f"{SOLVE} --sites layer_01,layer_02": {"model.sites": SITES},
    f"{SOLVE} --sites '[layer_01, layer_02]'": {"model.sites": SITES},
    f"{SOLVE} --sites layer_01": {"model.sites": ["layer_01"]},
    f"{SOLVE} --sites all_parts --untrained llm": {
        "model.sites": "all_parts",
        "model.untrained": ["llm"],
    },
    f"{SOLVE} --sites null --strengths 1e-3,1e-2": {
        "model.sites": None,
        "solver.strengths": [1e-3, 1e-2],
    },
    f"{FIT} --model.sites layer_01 layer_02 --betas=0.8,0.9": {
        "model.sites": SITES,
        "model.betas": [0.8, 0.9],
    },
    f"{FIT} --model.sites layer_01 --trainer.devices 2": {
        "model.sites": ["layer_01"],
        "trainer.devices": "2",  # Lightning's own type; no list of one
    },
    f"{FIT} --trainer.devices 0,1": {"trainer.devices": [0, 1]},
    "probes knockout RUN --classes 'building, edifice' 'traffic light'": {
        "classes": ["building, edifice", "traffic light"]
    },
    "probes knockout RUN --classes 'traffic light,sky'": {"classes": ["traffic light", "sky"]},
    "probes study M D --out R --add umap knockout.classes=sky,road": {
        "add": ["umap", "knockout.classes=sky,road"]
    },
    "llava-bidir vqa M --tasks pope gqa --out R": {"tasks": ["pope", "gqa"]},
    # and they leave what the words without a name need
    "probes knockout --classes sky road RUN": {"classes": ["sky", "road"], "probes": "RUN"},
    "probes maps --image 3 4 RUN --out R": {"image": [3, 4], "probes": "RUN"},
    "probes states --sites layer_01,layer_02 M a.png b.png --out F": {
        "sites": SITES,
        "mllm": "M",
        "image": ["a.png", "b.png"],
    },
    "probes states --sites layer_01 layer_02 M a.png --out F": {"sites": SITES, "image": ["a.png"]},
    "probes study --tasks depth normals M D --out R": {
        "tasks": ["depth", "normals"],
        "inputs": ["M", "D"],
    },
    "llava-bidir vqa --tasks pope gqa M --out R": {"tasks": ["pope", "gqa"], "model": "M"},
    # short names, with dashes or not, unless two options end so
    f"{SOLVE} --folds 5 --memory-gb 2 --batch_size 3": {
        "solver.folds": 5,
        "solver.memory_gb": 2.0,
        "data.batch_size": 3,
    },
    f"{FIT} --max-epochs 2 --learning_rate 0.5": {
        "trainer.max_epochs": 2,
        "model.learning_rate": 0.5,
    },
    f"{SOLVE} --trainer.max_time 1 --trainer.devices 2": {"trainer": {"max_time": 1, "devices": 2}},
    # values that begin with "-"
    f"{SOLVE} --prefix -foo --data.name '- what'": {"model.prefix": "-foo", "data.name": "- what"},
    f"{FIT} --prefix -foo --trainer.max_steps -1": {
        "model.prefix": "-foo",
        "trainer.max_steps": -1,
    },
    "llava-bidir generate M a.png '- what' --max-new-tokens 3": {
        "words": ["a.png", "- what"],
        "max_new_tokens": 3,
    },
    # words without a name
    "probes verify-data DATA --workers 0": {"data.root": "DATA", "workers": 0},
    "probes verify-data --data.root DATA": {"data.root": "DATA"},
    "probes lab --port 1": {"runs": [], "port": 1},
    "probes segment --site adapter RUN a.png --out R b.png": {
        "probes": "RUN",
        "photos": ["a.png", "b.png"],
    },
    "probes plant drop M W O --pairs 2": {"what": "drop", "model": "M", "out": "O", "pairs": 2},
}


class Parsed(BaseException):
    """Raised where a run of LightningCLI would begin."""


def read(program: str, command: str, words: list[str], monkeypatch):
    """Return the options of a command."""
    options = COMMANDS[program, command].options
    if options is not None:
        return Parser(options).read(words)
    parsed = []

    def stop(cli):
        parsed.append(cli.config[cli.subcommand])
        raise Parsed

    monkeypatch.setattr(RunCLI, "instantiate_classes", stop)
    monkeypatch.setattr("probes.fit.cli.choose_model", lambda *_: None)  # there is no model
    with pytest.raises(Parsed):
        MAIN[program]([command, *words])
    return parsed[0]


@pytest.mark.parametrize("words", CASES)
def test_words_mean_what_readme_and_contract_say(words, monkeypatch):
    options = read(*shlex.split(words)[:2], shlex.split(words)[2:], monkeypatch)
    for name, expected in CASES[words].items():
        value = attrgetter(name)(options)
        if isinstance(expected, list):
            value = [item if type(item) is type(expected[0]) else str(item) for item in value]
        elif isinstance(value, Namespace):
            value = value.as_dict()
        elif isinstance(expected, str):
            value = str(value)
        assert value == expected, name


EMPTY = {  # as a path, the current folder: the error
    "llava-bidir vqa M --out R --data ''": "--data is empty",
    "llava-bidir status ''": "--runs is empty",
    "llava-bidir fit -c stage1 -c clip --out ''": "--out is empty",
}


@pytest.mark.parametrize("words", EMPTY)
def test_empty_paths_are_refused(words, capsys):
    program, *argv = shlex.split(words)
    with pytest.raises(SystemExit) as stop:
        MAIN[program](argv)
    assert stop.value.code == 2 and EMPTY[words] in capsys.readouterr().err
