"""Batches of a killed analysis, and what it leaves."""

import os
from pathlib import Path

import pytest
import torch

from llava_bidir.common.cli import Parser
from llava_bidir.common.errors import NothingToMeasure
from probes.analyses import MEASURED
from probes.analyses.analysis import Analysis, run_analysis
from probes.analyses.sinks import SinksOptions


def test_only_missing_or_damaged_batches_are_computed_again(runs, tmp_path):
    run = runs["causal"]
    computed = []
    folder = tmp_path / "letters.partial"

    def compute(items: str) -> dict[str, torch.Tensor]:
        computed.append(items)
        return {"x": torch.full((100,), len(computed))}

    def batches(limit: int) -> list[int]:
        computed.clear()
        options = SinksOptions(probes=run.path, out=tmp_path, limit=limit)
        analysis = Analysis("letters", "Which letters?")
        return analysis.in_batches(run, options=options, items="abcdefg", size=2, compute=compute)[
            "x"
        ][::100].tolist()

    assert batches(8) == [1, 2, 3, 4]
    (folder / "000001.safetensors").unlink()
    os.truncate(folder / "000002.safetensors", 200)
    assert batches(8) == [1, 1, 2, 4]
    assert computed == ["cd", "ef"]
    batches(9)
    assert computed == ["ab", "cd", "ef", "g"], "other options"


def test_an_analysis_without_a_case_is_left_out_before_its_first_batch_too(runs, tmp_path):
    """As of questions about one image: the folder of its batches was not there to be removed."""

    def measure(run, options):
        raise NothingToMeasure("no question")

    analysis = Analysis("letters", "Which letters?", measure=measure)
    with pytest.raises(NothingToMeasure, match="no question"):
        run_analysis(analysis, SinksOptions(probes=runs["causal"].path, out=tmp_path / "new"))


@pytest.mark.parametrize("name", MEASURED)
def test_a_run_is_named_by_the_first_word_or_by_an_option(name):
    """As of `probes segment RUN`."""
    parser = Parser(MEASURED[name].options)
    more = ["--overwrite", *["--classes=[sky]"] * (name == "knockout")]
    read = parser.read(["RUN", *more])
    assert read == parser.read([*more, "--probes", "RUN"])
    assert read.probes == Path("RUN")
