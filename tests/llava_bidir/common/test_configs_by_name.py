"""Configs by name, in a clone and in a wheel."""

import re
from pathlib import Path

import pytest

from llava_bidir import cli as llava_bidir
from llava_bidir.common.configs import FOLDER, config_names, find_config, with_config_paths
from probes import cli as probes


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


@pytest.mark.parametrize(
    ("package", "words"),
    [
        (llava_bidir, "fit --data.template plain -c {config}"),
        (llava_bidir, "verify-data -c clip --model.lora.r 4 -c {config}"),
        (llava_bidir, "test --trainer.callbacks+=EarlyStopping -c {config}"),
        (probes, "solve --data.template plain -c {config}"),
        (probes, "study MODEL DATA --data.root D -c {config}"),
    ],
)
def test_an_option_that_a_later_config_replaces_is_refused(package, words, tmp_path, monkeypatch):
    # it refuses misspelt and missing options before
    monkeypatch.setattr(llava_bidir, "check_options", lambda *args: None)
    config = tmp_path / "own.yaml"
    config.write_text(
        "data: {template: chat, root: R}\nmodel: {lora: null, encoder: {layer: -1}}\ntrainer: {callbacks: []}"
    )
    words = words.format(config=config)
    option = next(word for word in words.split() if word.startswith("--"))
    name = option.partition("=")[0].removesuffix("+")
    message = f"{name} comes before the config {config}, which would replace its value; put options after -c"
    with pytest.raises(SystemExit, match=re.escape(message)):
        package.main(words.split())


def test_options_that_no_later_config_has_may_stand_anywhere(tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text("data: {template: chat}\nmodel: {encoder: {layer: -1}}")
    words = (
        f"fit --out O --model.encoder.path E --data.template_x x -c {config} --data.template plain"
    )
    assert with_config_paths(words.split()) == words.split()
    again = f"fit --data.template plain -c {config} --data.template plain"
    assert with_config_paths(again.split()) == again.split()


@pytest.mark.parametrize(
    ("package", "words"),
    [
        (llava_bidir, "fit -c stage1 -c clpi --data.annotations A --data.images B"),
        (probes, "solve -c clpi"),
    ],
)
def test_an_unknown_name_is_told_before_missing_options(package, words):
    message = f"there is no config 'clpi' in {FOLDER}, and no such file; did you mean 'clip'?"
    with pytest.raises(SystemExit, match=re.escape(message)):
        package.main(words.split())
