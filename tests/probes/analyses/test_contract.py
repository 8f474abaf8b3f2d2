"""What every analysis keeps: same seed, same bytes; replacement; errors in one line; its numbers in the report."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import probe_runs
import pytest
from PIL import Image
from task_runs import write_depth_run

from probes.analyses import ANALYSES, MEASURED
from probes.cli import main

pytestmark = pytest.mark.skipif(
    find_spec("umap") is None, reason="umap-learn (extra: figures) is not installed"
)

NUMBER = r"-?\d+\.\d+(e-?\d+)?"


class Case(NamedTuple):
    """Options of an analysis, and CSV files of the report whose numbers are those of the analysis."""

    options: str
    files: tuple[str, ...] = ()


CASES = {
    "position": Case(""),
    "norms": Case("--limit 2", ("norms_causal",)),
    "sinks": Case("--limit 2"),
    "knockout": Case("--classes sky wall --draws 1"),
    "routes": Case("--limit 2 --draws 1", ("routes_causal", "answer_accuracy")),
    "patching": Case("--site layer_02 --limit 4 --draws 1", ("patching_causal",)),
    "maps": Case("--image 1 3"),
    "umap": Case("--image 1 --sites adapter", ("umap_causal_1",)),
}


def test_every_analysis_keeps_the_contract():
    of_solved_probes = {"learning_curve"}  # tests/probes/solve/test_subsets.py
    assert set(CASES) | of_solved_probes == set(MEASURED)


class Study:
    """Copies of a causal and a bidirectional run, with every analysis of the causal one."""

    def __init__(self, folder: Path, runs):
        self.folder = folder
        self.runs = [
            shutil.copytree(runs[mask].path, folder / mask) for mask in ("causal", "bidirectional")
        ]
        self.questions = probe_runs.write_questions(runs["causal"], folder)

    def result(self, name: str) -> Path:
        return self.runs[0] / f"{name}.json"

    def run(self, name: str, *more: str, of: int = 0) -> None:
        command = [name, "--probes", str(self.runs[of]), *CASES[name].options.split()]
        if name == "routes":
            command += ["--questions", str(self.questions)]
        main([*command, *more])


@pytest.fixture(scope="module")
def study(runs, tmp_path_factory) -> Study:
    made = Study(tmp_path_factory.mktemp("contract"), runs)
    for name in CASES:
        made.run(name)
    return made


@pytest.mark.parametrize("name", CASES)
def test_same_seed_gives_the_same_files(name, study, tmp_path):
    study.run(name, "--out", str(tmp_path))
    written = [file for file in tmp_path.iterdir() if not file.name.startswith(".")]
    assert study.result(name).name in {file.name for file in written}
    for file in written:
        assert file.read_bytes() == (study.result(name).parent / file.name).read_bytes(), file.name


def test_a_result_of_other_options_or_runs_is_not_replaced_unless_it_is_asked_for(study, tmp_path):
    result = Path(shutil.copy(study.result("sinks"), tmp_path))
    before = result.read_bytes()
    out = ["--out", str(tmp_path)]
    for more, of, message in ((["--limit", "3"], 0, "with limit 2;"), ([], 1, "from other runs;")):
        with pytest.raises(SystemExit, match=f"{result} is finished and was made {message}"):
            study.run("sinks", *out, *more, of=of)
    assert result.read_bytes() == before
    study.run("sinks", *out, "--limit", "3", "--overwrite", "true")
    assert result.read_bytes() != before


def numbers(text: str) -> set[float]:
    """All numbers of a text that have a decimal point, up to the ninth digit."""
    return {float(f"{float(number[0]):.9g}") for number in re.finditer(NUMBER, text)}


@pytest.fixture(scope="module")
def report(study) -> Path:
    out = study.folder / "report"
    main(["report", str(study.folder), "--out", str(out)])
    return out


@pytest.mark.parametrize("name", CASES)
def test_the_report_shows_the_numbers_of_the_analysis(name, study, report):
    made = json.loads(study.result(name).read_text())
    results = json.loads((report / "results.json").read_text())
    if name in results["masks"]["causal"]:
        in_results = results["masks"]["causal"][name]
        both = in_results.keys() & made.keys()
        assert len(both) > 2
        assert all(in_results[key] == made[key] for key in both)
    assert ANALYSES[name].title in (report / "index.html").read_text()  # "" of sinks
    measured_numbers = numbers(study.result(name).read_text())
    for file in CASES[name].files:
        shown = numbers((report / f"{file}.csv").read_text())
        assert shown and shown <= measured_numbers, (
            f"{file}: {sorted(shown - measured_numbers)[:5]}"
        )


# ------------------------------------------------------------------------------------------ errors
BAD = [
    ("knockout", "--classes moon", "unknown class 'moon'; .* has sky, wall, road"),
    (
        "knockout",
        "--classes sky wall --min-patches 5",
        "no image has 5 or more patches wrongly .* sky or wall;",
    ),
    ("knockout", "--classes sky wall sky", "class 'sky' is named twice"),
    ("knockout", "--layers 0", "layer 0 is out of range; .* has layers 1..3"),
    ("patching", "--layers 2", "--layers 2 is not before the read-out layer_02; expected 0"),
    ("routes", "--window 4", "window is 4; expected 1 to 3, the model's layers"),
    ("maps", "--image 9", "image 9 is out of range; the split has images 0..8"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_a_bad_option_is_an_error_and_leaves_nothing(name, options, message, study, tmp_path):
    with pytest.raises(SystemExit, match=f"^probes: .*{message}"):
        study.run(name, *options.split(), "--out", str(tmp_path))
    assert not [file for file in tmp_path.iterdir() if not file.name.startswith(".")]


@pytest.mark.parametrize("command", ["knockout --classes auto:1 --probes", "umap --probes"])
def test_what_is_about_classes_names_the_task(command, segmentation, tmp_path):
    write_depth_run(tmp_path / "run", [0.5, 0.8, 0.7, 0.6, 0.6], segmentation)
    expected = "^probes: .*probes of the task depth, but .* about .*classes"
    with pytest.raises(SystemExit, match=expected):
        main([*command.split(), str(tmp_path / "run")])


# ------------------------------------------------------------------------------------------ states
def test_states_replace_no_file(checkpoints, tmp_path):
    out = tmp_path / "model.safetensors"
    photo = tmp_path / "a.png"
    out.write_bytes(b"weights")
    Image.new("RGB", (40, 30)).save(photo)
    command = ["states", str(checkpoints["causal"]), str(photo), "--out", str(out)]
    with pytest.raises(SystemExit, match=r"model.safetensors exists; --overwrite true replaces it"):
        main(command)
    assert out.read_bytes() == b"weights"
    main([*command, "--overwrite", "true"])
    assert len(out.read_bytes()) > 1000
