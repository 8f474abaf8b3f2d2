"""Options of a dataclass: words, YAML and values make the same one, by the same checks."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from llava_bidir.common import imports
from llava_bidir.common.cli import Count, Indices, Parser, Values, positional
from llava_bidir.common.errors import UsageError, UserError


@dataclass(frozen=True)
class Solver:
    """A part.

    Args:
        folds: Folds.
        memory_gb: Memory.
    """

    folds: Count = 4
    memory_gb: float | None = None


@dataclass(frozen=True, kw_only=True)
class Base:
    """What all have.

    Args:
        pair: Two folders,
            on the same images.
        solver: A part.
    """

    pair: tuple[Path, Path]
    solver: Solver = Solver(folds=3)


@dataclass(frozen=True, kw_only=True)
class Options(Base):
    """More.

    Args:
        model: A model.
        photos: Photos.
        image: Indices.
        layers: Layers.
        control: A control.
        by_class: Hold classes fixed.
        share: A share.
        trainer: What another checks.
    """

    model: str = positional()
    photos: tuple[str, ...] = positional()
    image: Indices = (0,)
    layers: tuple[int, ...] | None = None
    control: Literal["random", "matched"] = "random"
    by_class: bool = False
    share: float = 0.9
    trainer: Values = field(default_factory=dict)


VALUES = {
    "model": "m",
    "photos": ["a, b", "1"],
    "pair": ["a", "b"],
    "solver": {"memory_gb": 2},
    "image": [3, 4],
    "layers": [1, 2],
    "control": "matched",
    "by_class": True,
    "trainer": {"devices": 2, "callbacks": [{"class_path": "os.system"}]},
}
MADE = Options(
    model="m",
    photos=("a, b", "1"),
    pair=(Path("a"), Path("b")),
    solver=Solver(3, 2.0),
    image=(3, 4),
    layers=(1, 2),
    control="matched",
    by_class=True,
    trainer=VALUES["trainer"],
)
REST = ["--trainer.callbacks", '[{"class_path": "os.system"}]', "--trainer.devices", "2"]


@pytest.mark.parametrize(
    "words",
    [
        "--pair a b --image 3 4 --layers 1 2 --control matched --by-class --memory-gb 2",
        "--pair=[a,b] --image [3,4] --layers=[1,2] --control=matched --by_class true --solver.memory_gb 2",
    ],
)
def test_words_yaml_and_values_make_the_same_options(words, tmp_path):
    """A list ends at the next option; words without a name may stand before and after options."""
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    parser = Parser(Options)
    assert parser.read(["m", "a, b", *words.split(), *REST, "--share", ".9", "1"]) == MADE
    assert parser.read(["-c", str(file)]) == parser.read([], VALUES) == MADE
    assert parser.read(["--share", ".5", "-c", str(file)]).share == 0.5, (
        "wherever the config stands"
    )


def test_later_configs_replace_earlier_ones_key_by_key(tmp_path):
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    files[0].write_text("trainer: {devices: 1, precision: 16-mixed}\nsolver: {folds: 5}")
    files[1].write_text("trainer: {devices: 2}\nsolver: {memory_gb: 1}\npair: [a, b]")
    configs = [word for file in files for word in ("-c", str(file))]
    read = Parser(Options).read(["m", "p", *configs, "--trainer.max_steps", "3"])
    assert read.trainer == {"devices": 2, "precision": "16-mixed", "max_steps": 3}
    assert read.solver == Solver(5, 1.0)
    assert type(read.solver.folds) is int, "as checkpoints hold it, which load without code"


BAD = {  # YAML: parts of the error
    "image: 1": ["image", "tuple", "1"],
    "image: [-1]": ["image", "Index", "v>=0"],
    "solver: {fold: 1}": ["'solver'", "'fold'", "did you mean 'solver.folds'?"],
    "solver: 3": ["solver", "3"],
    "pair: [a]": ["pair", "2 elements"],
    "image: [1": ["own.yaml", "expected"],
    "hello": ["own.yaml", "hello"],
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_value_is_an_error_that_names_the_option(text, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        Parser(Options).read(["m", "p", "--pair", "a", "b", "-c", str(file)])
    assert all(part in str(error.value) for part in BAD[text]), error.value


FILES = {  # name and content of a file to import: the error
    ("none.py", None): "none.py: no such file",
    ("a-b.py", ""): "expected a file NAME.py",
    ("leaves.py", "import sys\nsys.exit(0)"): "leaves.py ends the program",
    ("typo.py", "x = 1\ny = ("): r"typo.py: .*\(typo.py, line 2\)",
}


@pytest.mark.parametrize(("name", "content"), FILES)
def test_file_to_import_that_cannot_be_imported_is_named(name, content, tmp_path, monkeypatch):
    """`sys.exit(0)` in it ended the command with status 0; a typo was a traceback."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=FILES[name, content]):
        imports.take_imports(["--import", str(tmp_path / name)])
