"""Every Markdown file: links, commands and Python blocks."""

import ast
import re
import shlex
import subprocess
from importlib import import_module
from itertools import dropwhile, groupby
from pathlib import Path
from string import Template

import promises
import pytest
from extensions import EXAMPLES as EXTENDING
from extensions import forgotten

import llava_bidir.cli
import probes
import probes.cli
from llava_bidir.common.cli import Parser
from llava_bidir.common.errors import UsageError
from llava_bidir.common.imports import take_imports, take_option
from probes.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
)
FILES = sorted({name for name in LISTED.stdout.splitlines() if (ROOT / name).is_file()})
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES if name.endswith(".md")}
PROGRAMS = {"llava-bidir": llava_bidir.cli, "probes": probes.cli}
with forgotten():
    take_imports(["--import", str(EXTENDING / "analysis.py")])  # whose command README names
    TABLES = {"llava-bidir": llava_bidir.cli.COMMANDS, "probes": probes.cli.commands()}
OPTIONS = {  # of the commands; None of those of LightningCLI
    (program, name): command.options
    for program, groups in TABLES.items()
    for group in groups.values()
    for name, command in group.items()
}
MAKEFILES = (ROOT / "Makefile").read_text() + (ROOT / "tests/nightly.mk").read_text()
TARGETS = re.findall(r"^([\w-]+):", MAKEFILES, re.M)
CLASSES = {"mllm": "FrozenMLLM", "run": "ProbeRun"}  # of the variables in Python blocks
pytestmark = pytest.mark.skipif(bool(LISTED.returncode), reason="not a git checkout")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """Return what GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[list[str]]:
    """Return the commands of the bash blocks as words, with the block's own variables filled in."""
    found = []
    for block in blocks(text, "bash"):
        lines = block.replace("\\\n", " ").splitlines()
        variables = dict(re.findall(r"^(\w+)=\"?([^\"\n]*)\"?$", "\n".join(lines), re.M))
        for line in lines:
            words = shlex.split(Template(line).safe_substitute(variables), comments=True)
            parts = [
                list(part)
                for joint, part in groupby(words, lambda word: word in ("&&", "|", ";"))
                if not joint
            ]
            found += [list(dropwhile(re.compile(r"\w+=").match, part)) for part in parts]
    return [words for words in found if words]


COMMANDS = sorted(
    {(name, shlex.join(words)) for name, text in TEXTS.items() for words in commands(text)}
)
OF_PROGRAMS = [(name, command) for name, command in COMMANDS if command.split()[0] in PROGRAMS]


def is_of_lightning(command: str) -> bool:
    program, *words = shlex.split(command)
    return not words[0].startswith("-") and OPTIONS[program, words[0]] is None


# ------------------------------------------------------------------------------------------------------ links
@pytest.mark.parametrize("name", TEXTS)
def test_relative_links_and_anchors_resolve(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[name])):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        assert target.resolve().is_relative_to(ROOT), f"{name}: {link} leads out of the repository"
        target = target / "README.md" if target.is_dir() else target
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), (
            f"{name}: {link}"
        )


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_targets_of_make_in_inline_code_exist(name):
    """Those of code blocks have a test of their own."""
    text = prose(TEXTS[name])
    named = re.findall(r"`make ([a-z][\w-]*)", text)
    assert set(named) <= set(TARGETS), f"{name} names a target that the Makefile does not have"
    if name == "CHANGELOG.md":  # has old names of files, too
        return
    for path in re.findall(r"`((?:llava_bidir|probes|tests|configs|slurm|\.ci)/[\w./]*)`", text):
        places = (ROOT, (ROOT / name).parent)
        assert any((folder / path).exists() for folder in places), f"{name}: {path}"


# ------------------------------------------------------------------------------------------------------ commands
@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=lambda value: value[:60])
def test_files_and_targets_of_commands_exist(name, command):
    program, *words = shlex.split(command)
    if program == "make":
        assert {word for word in words if "=" not in word and word[0] != "-"} <= {*TARGETS}
    folders = r"(configs|tests|slurm|llava_bidir|probes|\.ci)/[\w./-]+$"
    files = [word for word in (program, *words) if re.match(folders, word)]
    assert all((ROOT / file).exists() for file in files), files


@pytest.mark.parametrize(
    ("name", "command"), [row for row in OF_PROGRAMS if not is_of_lightning(row[1])]
)
def test_command_parses(name, command, monkeypatch):
    """Options, their types, and the keys of all config files."""
    monkeypatch.chdir(ROOT)
    program, first, *words = shlex.split(command)
    if first in ("--help", "--version"):
        return
    try:
        _, words = take_option(words, "--import")
        Parser(OPTIONS[program, first]).read([word for word in words if word != "..."])
    except UsageError as error:
        assert "..." in words and "arguments are required" in str(error), f"{name}: {error}"
    except SystemExit as end:
        assert not end.code and {"--help", "-h"} & {*words}


class Parsed(BaseException):
    """Raised in place of the first step after parsing."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "command"), [row for row in OF_PROGRAMS if is_of_lightning(row[1])]
)
def test_command_of_lightning_parses(name, command, monkeypatch, capsys):
    from llava_bidir.common.lightning_cli import RunCLI

    def stop(*parsed, **options):
        raise Parsed

    monkeypatch.setattr(RunCLI, "instantiate_classes", stop)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that it is as before when the test ends
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    files, words = take_option(words, "--import")
    for file in files:
        if (EXTENDING / file).is_file():  # one that README shows
            words += ["--import", str(EXTENDING / file)]
    try:
        with forgotten():
            PROGRAMS[program].main([word for word in words if word != "..."])
    except Parsed:
        return
    except SystemExit as end:
        message = (capsys.readouterr().err.strip().splitlines() or [""])[-1]
        shortened = "..." in words and "required" in message
        # which are looked for after that
        parsed = re.search("data.annotations: no file|MLLM: MODEL: OSError", str(end))
        assert end.code == 0 or shortened or parsed, f"{name}: {end} {message}"


# ------------------------------------------------------------------------------------------------------ blocks
@pytest.mark.parametrize(
    ("name", "block"), [(n, b) for n, t in TEXTS.items() for b in blocks(t, "python")]
)
def test_python_block_compiles_and_uses_what_exists(name, block):
    for node in ast.walk(ast.parse(block)):
        match node:
            case ast.ImportFrom(module=module) if module.split(".")[0] in ("probes", "llava_bidir"):
                assert all(hasattr(import_module(module), alias.name) for alias in node.names), (
                    ast.unparse(node)
                )
            case ast.Attribute(value=ast.Name(id="probes"), attr=attribute):
                assert hasattr(probes, attribute), ast.unparse(node)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=variable), attr=method)) if (
                variable in CLASSES
            ):
                assert hasattr(getattr(probes, CLASSES[variable]), method), ast.unparse(node)


# ------------------------------------------------------------------------------------------------------ results
RESULTS = {  # said on the first page: the page that found it, and its words there
    "40 of 40": ("experiments/beyond_random/beyond_random.md", "40 of 40"),
    "3 in 240": ("experiments/beyond_random/beyond_random.md", "3 of 240"),
    "13 of 60": ("experiments/toy/toy_results.md", "13 of 60"),
    "−0.3 to +0.9": ("experiments/real/real.md", "/ +0.9 ["),
    "a rate of 6e-5 takes ten points of it, 2e-6 none": (
        "experiments/real/tower/tower.md",
        "−10.4 [−15.1, −5.7] worse",
    ),
    "3 to 9 points": ("experiments/real/real_photos.md", "3.9 to 8.8 points"),
    "60 at encoder layer 8, 50 at the adapter, 47": (
        "experiments/real/real_photos.md",
        "60 at encoder layer 8, 50 at the adapter, 47",
    ),
    "two or three layers before": ("probes/models/encoders.md", "two or three before the last"),
    "| 9 minutes |": ("tests/bench/README.md", "a pass of the solver 9 minutes"),
    "| 2.5 hours |": ("tests/bench/README.md", "20 epochs of ADE20K take 2.5 hours"),
    "35 sites of a 7B": ("tests/bench/README.md", "35 sites"),
}


@pytest.mark.parametrize("said", RESULTS)
def test_results_of_the_first_page_are_those_of_their_pages(said):
    page, found = RESULTS[said]
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")
    assert found in (ROOT / page).read_text(encoding="utf-8")


def test_the_first_page_is_read_in_a_minute_and_counts_the_families():
    text = TEXTS["README.md"]
    assert len(text.split()) <= 750
    llms = sum(family.has_llm for family in FAMILIES.values())
    assert f"[{llms} families]" in text


# ------------------------------------------------------------------------------------------------------ promises
def test_every_promise_names_a_file_of_tests():
    assert 30 <= len(promises.files()) <= 45
    for file in promises.files():
        assert "def test_" in (ROOT / "tests" / file).read_text(encoding="utf-8"), file


# ------------------------------------------------------------------------------------------------------ faults
KINDS = "silent, wrong number, crash, hang, half-written, unclear, lost work, security".split(", ")


def running_tests(file: Path) -> set[str]:
    """Return the tests of a file but those that are skipped whatever the machine is."""
    functions = [
        x for x in ast.walk(ast.parse(file.read_text("utf-8"))) if type(x) is ast.FunctionDef
    ]
    return {
        function.name
        for function in functions
        if function.name.startswith("test_")
        and not re.search(r"mark\.skip\b", " ".join(map(ast.unparse, function.decorator_list)))
    }


def test_every_fault_of_the_register_names_a_test_that_runs():
    lines = [line for line in TEXTS["tests/faults.md"].splitlines() if " | " in line]
    rows = [line for line in lines if not line.startswith(("---", "what a user did"))]
    assert rows
    for row in rows:
        did, happened, kind, test = row.split(" | ")
        path, _, name = test.partition("::")
        assert did and happened and kind in KINDS, row
        assert (ROOT / path).is_file() and name in running_tests(ROOT / path), row


def test_the_table_of_published_protocols_is_that_of_its_csv():
    from experiments.leaderboard.published import table_lines

    page = TEXTS["experiments/leaderboard/leaderboard.md"].splitlines()
    expected = table_lines(ROOT / "experiments/leaderboard/published.csv")
    assert [line for line in page if line in expected] == expected
