"""Words of the commands of a run: what stands first, what is printed as a config, and which error comes first."""

import shutil

import pytest
import yaml

from llava_bidir.common.cli import Parser
from probes.cli import main
from probes.config import SolveOptions, StudyOptions

PLACES = {"model": {"mllm": "M"}, "data": {"root": "D"}}


def printed(words: list[str], capsys) -> dict:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    "words", [["M", "D"], ["--mllm", "M", "D"], ["M", "--root", "D"], ["D", "--model.mllm=M"]]
)
def test_model_and_data_stand_first_or_are_options(words, capsys):
    solved = Parser(SolveOptions).read([*words, "--out", "x"])
    assert (solved.model.mllm, solved.data.root) == ("M", "D")
    fitted = printed(["fit", *words, "-c", "demo/probes", "--out", "x"], capsys)
    for section, expected in PLACES.items():
        assert fitted[section] | expected == fitted[section]


@pytest.mark.parametrize(("command", "options"), [("solve", SolveOptions), ("study", StudyOptions)])
def test_a_printed_config_is_the_command(command, options, capsys, tmp_path):
    words = ["M", "D", "--out", "x", "--folds", "3", "--sites", "[layer_01, adapter]"]
    config = printed([command, *words, "-c", "demo/probes"], capsys)
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(config))
    again = Parser(options).read(["-c", str(tmp_path / "printed.yaml")])
    assert again == Parser(options).read([*words, "-c", "demo/probes"])
    assert again.solver.folds == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("solve --image_attention rowz", "unknown image_attention 'rowz'"),
        ("solve --sites layer_99", "unknown site 'layer_99'"),
        ("solve --data.task deph", "there is no task 'deph'"),
        ("fit -c demo/probes --model.image_attention rowz", "unknown image_attention 'rowz'"),
        ("fit -c demo/probes --model.sites [layer_99]", "unknown site 'layer_99'"),
        ("fit -c demo/probes --data.task deph", "there is no task 'deph'"),
        ("study --image_attention rowz", "unknown image_attention 'rowz'"),
        ("study --sites layer_99", "unknown site 'layer_99'"),
        ("study --add knockoutt", "there is no analysis 'knockoutt'"),
        ("study --tasks deph", "there is no task 'deph'"),
        ("solve", "no_data"),
        ("fit -c demo/probes", "no_data"),
        ("study", "no_data"),
    ],
)
def test_names_are_checked_before_data_and_data_before_weights(
    words, message, checkpoints, tmp_path
):
    """There are neither data nor weights, so that an error of a name has read none."""
    model = shutil.copytree(checkpoints["causal"], tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"")
    command, *options = words.split()
    places = [str(model), str(tmp_path / "no_data"), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=message):
        main([command, *places, *options])
    assert not (tmp_path / "run").exists()
