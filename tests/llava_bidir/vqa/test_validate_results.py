"""Each thing that can be wrong with results is found, and named."""

import json

import numpy as np
import pytest
import vqa_results

from llava_bidir.vqa.benchmarks import BENCHMARKS
from llava_bidir.vqa.result_files import items_file, pins, results_file
from llava_bidir.vqa.validate_results import problems

RIGHT = np.arange(12) % 3 > 0


def edit(path, change) -> None:
    """Changes a JSON file, or the list of a JSONL file's lines."""
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
def test_sound_results_have_no_problems(out, name):
    assert problems(out, name, 0.0) == []


def test_data_of_the_hub_has_the_official_number_of_items(out):
    assert problems(out, "pope", 0.0) == []
    edit(results_file(out, "pope"), lambda facts: facts.update(data="hub"))
    assert problems(out, "pope", 0.0) == ["pope: 12 items, but the official split has 9000"]


def test_missing_and_doubled_items_are_named(out):
    edit(items_file(out, "gqa"), lambda items: items.pop(7))
    assert problems(out, "gqa", 0.0) == ["gqa: 1 of 12 items have no result, item 7 for one"]
    edit(items_file(out, "mme"), lambda items: items.append(items[4]))
    assert problems(out, "mme", 0.0) == ["mme: 1 items have several results, item 4 for one"]
    edit(items_file(out, "pope"), lambda items: items.clear())
    assert "pope: the harness yielded no results" in problems(out, "pope", 0.0)


@pytest.mark.parametrize("answer", ["", " ", "Yes.", "there is a wall"])
def test_unusable_answers_are_counted_and_shown(answer, out):
    def change(items):
        wrong = next(item for item in items if not item["right"])
        wrong["answer"] = answer

    edit(items_file(out, "pope"), change)
    facts = json.loads(results_file(out, "pope").read_text())
    items = [json.loads(line) for line in items_file(out, "pope").read_text().splitlines()]
    facts["harness"] = {title: c.parts(items).score() for title, c in BENCHMARKS["pope"].columns.items()}
    results_file(out, "pope").write_text(json.dumps(facts))
    (problem,) = problems(out, "pope", 0.05)
    assert problem.startswith("pope: 1 of 12 answers are empty or not of the kind asked for, item 0 for one: ")
    assert repr(answer) in problem and problems(out, "pope", 0.1) == []


def test_score_that_does_not_follow_from_the_items_is_a_problem(out):
    edit(results_file(out, "mme"), lambda facts: facts["harness"].update({"MME-C": 12.0}))
    (problem,) = problems(out, "mme", 0.0)
    assert problem.startswith("mme: the harness says MME-C 12.0, its items say ")


def test_results_of_other_versions_are_refused(out):
    edit(results_file(out, "gqa"), lambda facts: facts["versions"].update(lmms_eval="0.7.2"))
    (problem,) = problems(out, "gqa", 0.0)
    assert "lmms_eval 0.7.2 instead of 0.7.3" in problem
    edit(results_file(out, "mme"), lambda facts: facts["versions"].update(torch=pins()["torch"] + "+cu130"))
    assert problems(out, "mme", 0.0) == [], "what torch was built for is no other version"


def test_cut_file_says_what_to_do(out):
    results_file(out, "gqa").write_text("{")
    with pytest.raises(ValueError, match=r"gqa.json: .*; delete it to have the task run again"):
        problems(out, "gqa", 0.0)
