"""What a wrong file of `--import`, or of a model, prints: one line that names the function or the file."""

import re
from pathlib import Path

import probe_runs
import pytest
from extensions import forgotten

import llava_bidir.cli
import probes.cli

SOLVE = "probes solve -c configs/demo/probes.yaml --folds 2 --strengths 1e-1"
FIT = "probes fit -c configs/demo/probes.yaml --trainer.max_epochs 1 --model.sites [layer_02]"
RUN = "--model.mllm {model} --data.root {data} --out {out} --data.batch_size 2"
HEAD = "import probes\nfrom torch import nn\nprobes.register_head('mine', {})\n"
TASK = """
import probes
class Mine(probes.Task):
    name = "mine"
    targets = "segmentation"
    def read(self, target):
        return target.astype("float32")
    {}
probes.register_task(Mine())
"""
ANALYSIS = "import probes\ndef measure({}):\n    {}\n"
REGISTERED = "probes.register_analysis(probes.Analysis('mine', measure=measure))\n"
DATA = """
import probes
from probes.data.image_dataset import lookup
class Mine(probes.SegmentationDataset):
    def __init__(self, {}):
        super().__init__({}, ["sky", "wall"], lookup(2))
probes.register_dataset("mine", Mine)
"""
CASES = {  # file, command, and what it prints
    "a mask of a wrong shape": (
        "import llava_bidir\nllava_bidir.register_image_attention('mine', lambda is_image: is_image[:, 0])\n",
        "llava-bidir generate {model} {photo} sky",
        r"mine.py: image_attention 'mine' returned torch.bool\[2\]; expected block ids",
    ),
    "a mask without an argument": (
        "import llava_bidir\ndef rows():\n    pass\nllava_bidir.register_image_attention('mine', rows)\n",
        "llava-bidir generate {model} {photo} sky",
        r"mine.py:4, in <module>: TypeError: rows\(\) takes 0 positional arguments but 1 was given",
    ),
    "a head that takes other arguments": (
        HEAD.format("lambda width: nn.Linear(width, 3)"),
        f"{FIT} {RUN} --model.head mine",
        r"<lambda> of mine.py: too many positional arguments; it is called with \(width, classes, grid\)",
    ),
    "a head of a wrong shape": (
        HEAD.format("lambda width, classes, grid: nn.Linear(width, classes + 1)"),
        f"{FIT} {RUN} --model.head mine",
        r"head 'mine' returned a Tensor of shape \[2, 4, 4\]; expected shape \[2, 4, 3\]",
    ),
    "a name that is taken": (
        "import probes\nprobes.register_head('mlp', lambda width, classes, grid: None)\n",
        "probes sites {model}",
        "the head name 'mlp' is taken; choose another name",
    ),
    "a data set that lists its files": (
        DATA.format("root, split", "[1, 2]"),
        f"{SOLVE} {RUN} --data.dataset mine",
        r"Mine of mine.py lists its files as \[1, 2\]; expected {name: \(images, masks\)}, a pathlib.Path of each",
    ),
    "a data set without a split": (
        DATA.format("root", "{{}}"),
        f"{SOLVE} {RUN} --data.dataset mine",
        r"Mine of mine.py: too many positional arguments; it is called with \(root, split\)",
    ),
    "a task whose values have another shape": (
        TASK.format("def values(self, target):\n        return target"),
        f"{SOLVE} {RUN} --data.task mine",
        r"Mine.values of mine.py returned a Tensor of shape \[1, 24, 20\]; expected shape \[1, 24, 20, 1\]",
    ),
    "a task that raises": (
        TASK.format("def predict(self, maps):\n        return maps.squeese(-3)"),
        f"{SOLVE} {RUN} --data.task mine",
        r"mine.py:9, in predict: AttributeError: 'Tensor' object has no attribute 'squeese'",
    ),
    "a task that is no object": (
        TASK.format("pass").replace("Mine())", "Mine)"),
        f"{SOLVE} {RUN} --data.task mine",
        r"expected an object of a subclass of probes.Task, e.g. MyTask\(\)",
    ),
    "an analysis that returns nothing": (
        ANALYSIS.format("run, options", "pass") + REGISTERED,
        "probes mine {run}",
        "measure of mine.py returned a NoneType; expected a Result",
    ),
    "an analysis that takes the run alone": (
        ANALYSIS.format("run", "pass") + REGISTERED,
        "probes mine {run}",
        r"measure of mine.py: too many positional arguments; it is called with \(run, options\)",
    ),
    "an analysis whose effect is a number": (
        ANALYSIS.format("run, options", "return probes.Result({}, effects={'mine': 0.5})")
        + REGISTERED,
        "probes mine {run}",
        "effect 'mine' of mine is a float with 0 resamplings; expected a probes.Estimate with",
    ),
    "an analysis that is a tensor": (
        ANALYSIS.format("run, options", "return probes.Result({'x': run.weights})") + REGISTERED,
        "probes mine {run}",
        "the rows of measure of mine.py: Object of type Tensor is not JSON serializable",
    ),
    "two registrations": (
        ANALYSIS.format("run, options", "pass") + 2 * REGISTERED,
        "probes mine {run}",
        "analysis 'mine' is registered already; choose another name",
    ),
    "an analysis with the name of a command": (
        ANALYSIS.format("run, options", "pass") + REGISTERED.replace("mine", "sites"),
        "probes sites {model}",
        "analysis 'sites' has the name of a command; choose another name",
    ),
    "no registration": (
        "import probes\n",
        f"{FIT} {RUN} --model.head mine",
        "model.head is 'mine'; expected one of linear, mlp, conv; --import FILE.py registers your own",
    ),
    "no Python": ("def f(:\n", "probes sites {model}", r"mine.py: .*syntax.* \(mine.py, line 1\)"),
    "an error of its own": (
        "import nothing_of_this_name\n",
        "probes sites {model}",
        "mine.py:1, in <module>: ModuleNotFoundError: No module named 'nothing_of_this_name'",
    ),
    "a family whose type is taken": (
        "import probes\nprobes.register_family('llava', probes.Family)\n",
        "probes sites {model}",
        "family 'llava' is registered already; choose another model_type",
    ),
    "an encoder that returns nothing": (
        "def build():\n    pass\n",
        "probes sites {file}:build",
        r"build\(\) returned a NoneType; expected",
    ),
}


@pytest.fixture(scope="module")
def places(checkpoints, segmentation, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wrong")
    run = probe_runs.write_run(folder / "run", [0.5, 0.4, 0.5, 0.6], root=segmentation)
    photo = segmentation / "images/validation/000.png"
    return {"model": checkpoints["causal"], "data": segmentation, "run": run, "photo": photo}


def said(command: str, capsys) -> str:
    """Return what a command that fails prints last."""
    program, *words = command.split()
    main = {"probes": probes.cli, "llava-bidir": llava_bidir.cli}[program].main
    with pytest.raises(SystemExit) as stop:
        main(words)
    return str(stop.value) if isinstance(stop.value.code, str) else capsys.readouterr().err.strip()


@pytest.mark.parametrize("what", CASES)
def test_a_wrong_file_is_one_line_that_names_what_is_wrong(what, places, tmp_path, capsys):
    text, command, message = CASES[what]
    file = tmp_path / "mine.py"
    file.write_text(text)
    words = command.format(**places, out=tmp_path / "out", file=file)
    if "{file}" not in command:
        words += f" --import {file}"
    with forgotten():
        line = said(words, capsys)
    print(f"{what}\n    {line}")
    assert "\n" not in line and re.search(message, line), line
    assert not [*(tmp_path / "out").glob("*.json")], "nothing half-written"


@pytest.mark.parametrize(
    ("file", "message"), [("nofile.py", "no such file"), ("a-b.py", "NAME.py")]
)
def test_a_file_that_cannot_be_imported_is_named(file, message, tmp_path, capsys):
    (tmp_path / "a-b.py").touch()
    line = said(f"probes sites MODEL --import {tmp_path / file}", capsys)
    assert f"{file}: " in line and message in line and "\n" not in line
