"""A finished result of other options or runs is replaced only if the user asks for it."""

import probe_runs
import pytest
from PIL import Image

from probes.cli import main

ANALYSES = {
    "knockout": (["--classes", "sky", "wall"], ["--classes", "sky"], 'classes ["sky", "wall"]'),
    "patching": (
        ["--site", "layer_02", "--limit", "4", "--draws", "1"],
        ["--layers", "1"],
        "layers [0, 1]",
    ),
    "starvation": (["--site", "layer_02"], ["--by-class"], '"by_class": false'),
    "answers": (["--limit", "2", "--draws", "1"], ["--draws", "2"], "draws 1"),
    "umap": (["--image", "1", "--sites", "adapter"], ["--sites", "layer_02"], 'sites ["adapter"]'),
    "maps": (["--image", "1", "3"], ["--image", "2"], "image [1, 3]"),
}


@pytest.fixture(params=ANALYSES)
def call(request, runs, tmp_path):
    """A function that runs an analysis into a folder, its result, and what an error says of other options."""
    first, other, made = ANALYSES[request.param]
    paths = [str(runs[mask].path) for mask in ("causal", "bidirectional")]
    start = [
        request.param,
        "--probes",
        *(paths if request.param == "starvation" else paths[:1]),
        *first,
    ]
    if request.param == "answers":
        start += ["--questions", str(probe_runs.write_questions(runs["causal"], tmp_path))]
    out = tmp_path / "out"
    return (
        lambda *more: main([*start, "--out", str(out), *more]),
        out / f"{request.param}.json",
        other,
        made,
    )


def test_other_options_do_not_replace_a_result_unless_asked_to(call):
    run, result, other, made = call
    run()
    before = result.read_bytes()
    run()
    assert result.read_bytes() == before, "the same command can be run again"
    with pytest.raises(SystemExit) as error:
        run(*other)
    assert f"{result} is finished and was made with" in str(error.value)
    assert made in str(error.value)
    assert "--overwrite true replaces it, --out DIR writes elsewhere" in str(error.value)
    assert result.read_bytes() == before
    run(*other, "--overwrite", "true")
    assert result.read_bytes() != before


def test_result_of_another_run_is_not_replaced(runs, tmp_path):
    command = ["knockout", "--classes", "sky", "--out", str(tmp_path), "--probes"]
    main([*command, str(runs["causal"].path)])
    with pytest.raises(SystemExit, match=r"knockout.json is finished and was made from other runs"):
        main([*command, str(runs["bidirectional"].path)])


def test_states_replace_no_file(checkpoints, tmp_path):
    out = tmp_path / "model.safetensors"
    photo = tmp_path / "a.png"
    out.write_bytes(b"weights")
    Image.new("RGB", (40, 30)).save(photo)
    command = ["states", str(checkpoints["causal"]), str(photo), "--out", str(out)]
    with pytest.raises(SystemExit, match=r"model.safetensors exists; --overwrite true replaces it"):
        main(command)
    assert out.read_bytes() == b"weights"
    main([*command, "--overwrite", "true"])
    assert len(out.read_bytes()) > 1000


def test_overwrite_is_true_or_false(capsys):
    with pytest.raises(SystemExit):
        main(["knockout", "--probes", "RUN", "--classes", "sky", "--overwrite", "yes"])
    assert "expected true or false, got 'yes'" in capsys.readouterr().err
