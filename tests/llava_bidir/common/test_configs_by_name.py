"""Configs by name, in a clone and in a wheel."""

from pathlib import Path

from llava_bidir.common.configs import FOLDER, config_names, configs_first, find_config


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
    assert find_config("clip") == FOLDER / "encoder/clip.yaml", "a folder is no config"
    Path("stage2").write_text("")
    words = ["-c", "stage2", "--out", "clip", "--config=clip"]
    option = "--config=stage2"
    assert configs_first(words) == [
        option,
        f"--config={FOLDER / 'encoder/clip.yaml'}",
        "--out",
        "clip",
    ]
