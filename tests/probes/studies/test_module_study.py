"""A study of a module of one's own: its controls, what is left out before any work, and the finished run."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import own_modules
import pytest
import tiny_models
import torch
from PIL import Image
from studies import study_of

import probes
from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.models import module_sources
from probes.studies.run import run_study

FILE = Path(own_modules.__file__)
OPTIONS = (
    "--data.batch_size 8 --trainer.accelerator cpu --folds 2 --strengths 1e-1 "
    "--model.sites [layer_00,layer_01,final_norm]"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_models.write_segmentation(tmp_path_factory.mktemp("data"), 8, 12, size=(32, 32))


def run(data: Path, out: Path, **settings) -> str:
    """Run a study of layers whose attention and MLP are not known, and return what it printed."""
    with redirect_stdout(StringIO()) as printed:
        run_study(
            study_of({"": f"{FILE}:build_closed"}, data=data, out=out, options=OPTIONS, **settings)
        )
    return printed.getvalue()


@pytest.fixture(scope="module")
def study(data, tmp_path_factory):
    """Return the folder of a study, and what it printed."""
    out = tmp_path_factory.mktemp("studies") / "study"
    return out, run(data, out, draws=1)


def test_random_layers_are_left_out_before_any_work_and_permuted_ones_are_solved(study):
    out, printed = study
    first, _, rest = printed.partition("\n")
    assert first.startswith("left out: random layers cannot be matched")
    assert "does not say its `parts`" in first and "trained" in rest
    assert (out / "permuted0/metrics.json").is_file() and not (out / "random0").exists()
    results = json.loads((out / "report/results.json").read_text())
    claims = {claim["claim"]: claim for claim in results["claims"]}
    assert claims.keys() == {"layer_gain"}, "no other layer is taken for the last one"
    reason = claims["layer_gain"]["verdicts"]["beyond_random"]["reason"]
    assert "draws of random layers: 0" in reason and "cannot be matched" in reason


def test_a_control_that_is_asked_for_by_name_and_cannot_be_is_an_error(data, tmp_path):
    with pytest.raises(UserError, match="arm random0 of .* cannot be matched .*--arms"):
        run(data, tmp_path / "study", arms=("trained", "random0"))
    assert not (tmp_path / "study/trained").exists()


def test_the_finished_run_loads_the_module_again(study, tmp_path, monkeypatch):
    """A run's file is trusted by option, or by the name of the file in the same process."""
    out, _ = study
    Image.effect_noise((40, 32), 80).convert("RGB").save(tmp_path / "photo.jpg")
    words = ["segment", str(out / "permuted0"), str(tmp_path / "photo.jpg")]
    words += ["--site", "layer_01", "--out", str(tmp_path / "maps")]
    monkeypatch.setattr(module_sources, "_named", set())  # of another process
    with pytest.raises(SystemExit, match="a file with code. Read it, then allow it: --trust true"):
        main(words)
    main([*words, "--trust", "true"])
    assert (tmp_path / "maps/photo.png").is_file()
    encoder = probes.ProbeRun(out / "permuted0", trust=True).mllm()
    weights = {"untrained": ["encoder"], "match": "permuted"}
    again = probes.load(f"{FILE}:build_closed", device="cpu", **weights)
    pixels = torch.randn(1, 3, 32, 32)
    for site, states in again.states(pixels).items():
        assert torch.equal(states, encoder.states(pixels)[site])
