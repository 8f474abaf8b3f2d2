"""Configs by name, in a clone and in a wheel."""

from pathlib import Path

import pytest

from llava_bidir.cli import main
from llava_bidir.common.configs import FOLDER, config_names, find_config, with_config_paths
from llava_bidir.common.errors import UserError

ROOT = Path(__file__).parents[3]


def test_every_config_has_a_name_and_short_ones_are_unique():
    names = config_names()
    assert {file.relative_to(FOLDER) for file in names.values()} == {
        f.relative_to(FOLDER) for f in FOLDER.rglob("*.yaml")
    }
    expected = {
        "stage2": "stage2.yaml",
        "demo/stage2": "demo/stage2.yaml",
        "clip": "encoder/clip.yaml",
        "zero3": "cluster/zero3.yaml",
        "ade20k": "probes/ade20k.yaml",
    }
    for name, file in expected.items():
        assert names[name] == FOLDER / file


def test_a_path_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clip").mkdir()
    assert find_config("clip") == str(FOLDER / "encoder/clip.yaml"), "a folder is no config"
    Path("stage2").write_text("")
    assert with_config_paths(["fit", "-c", "stage2", "--config=clip", "--out", "clip"]) == [
        *("fit", "-c", "stage2", f"--config={FOLDER / 'encoder/clip.yaml'}", "--out", "clip")
    ]


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UserError, match="there is no config 'stage3'.*ade20k.*stage2"):
        find_config("stage3")


def test_configs_are_listed_printed_and_copied(tmp_path, capsys):
    main(["configs"])
    assert "demo/probes" in capsys.readouterr().out
    main(["configs", "ade20k"])
    assert capsys.readouterr().out == (ROOT / "configs/probes/ade20k.yaml").read_text()
    main(["configs", "--copy", str(tmp_path)])
    found = {file.relative_to(tmp_path) for file in tmp_path.rglob("*.yaml")}
    assert found == {file.relative_to(FOLDER) for file in FOLDER.rglob("*.yaml")}
    with pytest.raises(SystemExit, match="exists"):
        main(["configs", "clip", "--copy", str(tmp_path)])
    own = tmp_path / "own.yaml"
    own.write_text("")
    with pytest.raises(
        SystemExit, match="own.yaml is a file of your own; --copy takes a config by"
    ):
        main(["configs", str(own), "--copy", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "fit -c demo/stage1",
            "no file runs/demo/assets/captions.json; run `probes demo` first",
        ),
        ("fit -c real/stage1", "no file runs/real/.*; run `probes real` first"),
    ],
)
def test_a_config_of_a_demo_that_is_not_there_says_how_to_make_it(
    words,
    message,
    tmp_path,
    monkeypatch,
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main([*words.split(), "--trainer.accelerator", "cpu"])
