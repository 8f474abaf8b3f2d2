"""Every defect of results is found, with the task and the item."""

import json

import numpy as np
import pytest
import vqa_results

from llava_bidir.vqa.benchmarks import BENCHMARKS
from llava_bidir.vqa.harness import local_dataset
from llava_bidir.vqa.result_files import dataset_digest, items_file, pinned_versions, results_file
from llava_bidir.vqa.validate_results import find_problems

RIGHT = np.arange(12) % 3 > 0


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
    assert find_problems(out, "gqa", 0.0) == ["gqa: 1 of 12 items have no result, e.g. item 7"]
    edit(items_file(out, "mme"), lambda items: items.append(items[4]))
    assert find_problems(out, "mme", 0.0) == ["mme: 1 items have several results, e.g. item 4"]
    edit(items_file(out, "pope"), lambda items: items.clear())
    assert "pope: the harness returned no results" in find_problems(out, "pope", 0.0)


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


def test_results_of_other_versions_are_rejected(out):
    edit(results_file(out, "gqa"), lambda info: info["versions"].update(lmms_eval="0.7.2"))
    (problem,) = find_problems(out, "gqa", 0.0)
    assert "lmms_eval 0.7.2 instead of 0.7.3" in problem
    edit(results_file(out, "mme"), lambda info: info["versions"].update(torch=pinned_versions()["torch"] + "+cu130"))
    assert find_problems(out, "mme", 0.0) == [], "the local part of torch's version is ignored"


def test_cut_file_says_what_to_do(out):
    results_file(out, "gqa").write_text("{")
    with pytest.raises(ValueError, match=r"gqa.json: .*; delete it to run the task again"):
        find_problems(out, "gqa", 0.0)


def test_digest_of_local_data_sees_pictures_and_linked_folders(tmp_path, monkeypatch):
    """Under Python 3.11, Path.rglob follows no links."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/part.parquet").write_bytes(b"rows")
    (tmp_path / "ORG/NAME").mkdir(parents=True)
    (tmp_path / "ORG/NAME/data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a.png").write_bytes(b"a picture")
    (tmp_path / "questions.json").write_text(json.dumps([{"image": "a.png"}] * 2))
    toy = local_dataset(BENCHMARKS["toy"], "json")
    assert toy == ["questions.json", "a.png"]
    for paths, file in ((["ORG/NAME"], "elsewhere/part.parquet"), (toy, "a.png"), (toy, "questions.json")):
        before = dataset_digest(tmp_path, paths)
        (tmp_path / file).write_bytes(b"changed")
        assert dataset_digest(tmp_path, paths) != before
