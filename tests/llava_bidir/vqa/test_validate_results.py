"""Every defect of results is found, with the task and the item."""

import json

import numpy as np
import pytest
import vqa_results

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
    assert find_problems(out, name) == []


def test_data_of_the_hub_has_the_official_number_of_items(out):
    assert find_problems(out, "pope") == []
    edit(results_file(out, "pope"), lambda info: info.update(data="hub"))
    assert find_problems(out, "pope") == ["pope: 12 items, but the official split has 9000"]


def test_missing_and_doubled_items_are_named(out):
    edit(items_file(out, "gqa"), lambda items: items.pop(7))
    assert find_problems(out, "gqa") == ["gqa: 1 of 12 items have no or several results, e.g. item 7"]
    edit(items_file(out, "mme"), lambda items: items.append(items[4]))
    assert find_problems(out, "mme") == ["mme: 1 of 12 items have no or several results, e.g. item 4"]
    edit(items_file(out, "pope"), lambda items: items.clear())
    assert "pope: 12 of 12 items have no or several results, e.g. item 0" in find_problems(out, "pope")


def test_score_that_does_not_follow_from_the_items_is_a_problem(out):
    edit(results_file(out, "mme"), lambda info: info["harness"].update({"MME-C": 12.0}))
    (problem,) = find_problems(out, "mme")
    assert problem.startswith("mme: the harness reports MME-C 12.0, but the items give ")


def test_cut_file_says_what_to_do(out):
    results_file(out, "gqa").write_text("{")
    with pytest.raises(ValueError, match=r"gqa.json: .*; delete it to run the task again"):
        find_problems(out, "gqa")
