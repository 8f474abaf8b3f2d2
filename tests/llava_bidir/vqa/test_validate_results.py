"""Every defect of results is found, with the task and the item."""

import json

import numpy as np
import pytest
import vqa_results

from llava_bidir.vqa.benchmarks import BENCHMARKS
from llava_bidir.vqa.result_files import results_file
from llava_bidir.vqa.validate_results import find_problems

RIGHT = np.arange(12) % 3 > 0


def items_file(out, name):
    return out / f"{name}.jsonl"


def edit(path, change) -> None:
    """Change a JSON file, or the list of lines of a JSONL file."""
    lines = path.suffix == ".jsonl"
    value = [json.loads(line) for line in path.read_text().splitlines()] if lines else json.loads(path.read_text())
    change(value)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in value) if lines else json.dumps(value))


@pytest.fixture
def out(tmp_path):
    for name in ("gqa", "mmbench", "mme", "pope"):
        vqa_results.write(tmp_path, name, RIGHT)
    return tmp_path


@pytest.mark.parametrize("name", ["gqa", "mmbench", "mme", "pope"])
def test_valid_results_pass(out, name):
    assert find_problems(out, name, 0.0) == []


def test_data_of_the_hub_has_the_official_number_of_items(out):
    assert find_problems(out, "pope", 0.0) == []
    edit(results_file(out, "pope"), lambda info: info.update(data="hub"))
    assert find_problems(out, "pope", 0.0) == ["pope: 12 items, but the official split has 9000"]


def test_missing_and_doubled_items_are_named(out):
    edit(items_file(out, "gqa"), lambda items: items.pop(7))
    assert find_problems(out, "gqa", 0.0) == ["gqa: 1 of 12 items have no or several results, e.g. item 7"]
    edit(items_file(out, "mme"), lambda items: items.append(items[4]))
    assert find_problems(out, "mme", 0.0) == ["mme: 1 of 12 items have no or several results, e.g. item 4"]
    edit(items_file(out, "pope"), lambda items: items.clear())
    assert "pope: 12 of 12 items have no or several results, e.g. item 0" in find_problems(out, "pope", 0.0)


@pytest.mark.parametrize("answer", ["", " ", "Yes.", "there is a wall"])
def test_invalid_answers_are_counted_and_quoted(answer, out):
    def change(items):
        wrong = next(item for item in items if not item["right"])
        wrong["answer"] = answer

    edit(items_file(out, "pope"), change)
    info = json.loads(results_file(out, "pope").read_text())
    items = [json.loads(line) for line in items_file(out, "pope").read_text().splitlines()]
    info["harness"] = {title: c.terms(items).score() for title, c in BENCHMARKS["pope"].columns.items()}
    results_file(out, "pope").write_text(json.dumps(info))
    (problem,) = find_problems(out, "pope", 0.05)
    assert problem.startswith("pope: 1 of 12 answers are empty or not of the requested form, e.g. item 0: ")
    assert repr(answer) in problem and find_problems(out, "pope", 0.1) == []


def test_a_guess_of_the_harness_is_an_invalid_answer(tmp_path):
    out = vqa_results.write(tmp_path / "mmmu", "mmmu", RIGHT)
    edit(items_file(out, "mmmu"), lambda items: [item.update(guessed=True) for item in items[:3]])
    (problem,) = find_problems(out, "mmmu", 0.2)
    assert "3 of 12 answers are empty or not of the requested form, e.g. item 0" in problem


def test_score_that_does_not_follow_from_the_items_is_a_problem(out):
    edit(results_file(out, "mme"), lambda info: info["harness"].update({"MME-C": 12.0}))
    (problem,) = find_problems(out, "mme", 0.0)
    assert problem.startswith("mme: the harness reports MME-C 12.0, but the items give ")


def test_cut_file_says_what_to_do(out):
    results_file(out, "gqa").write_text("{")
    with pytest.raises(ValueError, match=r"gqa.json: .*; delete it to run the task again"):
        find_problems(out, "gqa", 0.0)
