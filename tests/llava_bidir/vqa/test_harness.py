"""Where the harness of lmms-eval runs, without its environment."""

import json
import os
import sys
from pathlib import Path

import lmms_datasets
import pytest

import llava_bidir
from llava_bidir.cli import main
from llava_bidir.vqa import harness
from llava_bidir.vqa.harness import ask_harness, to_item
from llava_bidir.vqa.scores import BENCHMARKS

TOLD = """
import json, os, sys
first, *others = os.environ["PYTHONPATH"].split(os.pathsep)
(package,) = os.listdir(first)
found = os.path.realpath(os.path.join(first, package))
json.dump([found, others, os.environ.get("HF_HUB_OFFLINE")], open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize(("offline", "variable"), [(True, "1"), (False, None)])
def test_harness_finds_this_package_alone(offline, variable, tmp_path, monkeypatch):
    """Beside an installed one are torch and transformers of the main environment, which hid lmms-eval's."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/mine", "/more"]))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    ask_harness([sys.executable, "-S", "-c", TOLD, str(tmp_path / "told")], offline)
    package = os.path.realpath(Path(llava_bidir.__file__).parent)
    assert json.loads((tmp_path / "told").read_text()) == [package, ["/mine", "/more"], variable]


@pytest.mark.parametrize("name", ["gqa", "mmbench", "mme", "pope", "textvqa"])
def test_items_of_an_image_or_in_other_orders_are_one_unit(name, monkeypatch):
    """Intervals and tests would be those of independent items."""
    monkeypatch.setattr(harness, "rate_answer", lambda *_: 1.0)
    samples = [
        {"doc": getattr(lmms_datasets, name)(i), "doc_id": i, "target": ""}
        | {"arguments": [""], "filtered_resps": [""]}
        for i in range(6)
    ]
    units = [to_item(BENCHMARKS[name], sample)["unit"] for sample in samples]
    assert units[::2] == units[1::2] and len({*units}) == 3


def test_folder_of_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match="--data: no folder .*/none"):
        main(["vqa", "model", "--out", str(tmp_path), "--data", str(tmp_path / "none")])
