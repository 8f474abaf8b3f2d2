"""Every defect of results is found, with the task and the item."""

import json

import numpy as np
import pytest
import vqa_results

from llava_bidir.vqa.result_files import read_results


def edit(path, change) -> None:
    """Change a JSON file, or the list of lines of a JSONL file."""
    lines = path.suffix == ".jsonl"
    value = (
        [json.loads(line) for line in path.read_text().splitlines()]
        if lines
        else json.loads(path.read_text())
    )
    change(value)
    path.write_text(
        "".join(json.dumps(entry) + "\n" for entry in value) if lines else json.dumps(value)
    )


DEFECTS = {
    "missing": (
        "jsonl",
        lambda items: items.pop(7),
        "1 of 12 items have no or several results, e.g. item 7",
    ),
    "twice": (
        "jsonl",
        lambda items: items.append(items[4]),
        "1 of 12 items have no or several results, e.g. item 4",
    ),
    "none": (
        "jsonl",
        lambda items: items.clear(),
        "12 of 12 items have no or several results, e.g. item 0",
    ),
    "subset": (
        "json",
        lambda info: info.update(data="hub"),
        "12 items, but the official split has 2374",
    ),
    "score": (
        "json",
        lambda info: info["harness"].update({"MME-C": 12.0}),
        "reports MME-C 12.0, but the items give ",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_named(defect, tmp_path):
    vqa_results.write(tmp_path, "mme", np.arange(12) % 3 > 0)
    assert len(read_results(tmp_path, "mme")[1]) == 12
    kind, change, message = DEFECTS[defect]
    edit(tmp_path / f"mme.{kind}", change)
    with pytest.raises(ValueError, match=f"{tmp_path}/mme: .*{message}"):
        read_results(tmp_path, "mme")


def test_cut_file_says_what_to_do(tmp_path):
    vqa_results.write(tmp_path, "gqa", np.arange(12) % 3 > 0)
    (tmp_path / "gqa.json").write_text("{")
    with pytest.raises(ValueError, match=r"gqa.json: .*; delete it to run the task again"):
        read_results(tmp_path, "gqa")
