"""Broken configs: errors name the file or the key, and checkpoints are never loaded as pickles."""

import sys

import pytest
import tiny_models
import yaml

import llava_bidir.cli
import probes.cli


@pytest.fixture
def arguments(parts, conversations, checkpoints, segmentation) -> dict[str, list[str]]:
    """Valid arguments of `fit` by package."""
    model = ["--model.mllm", str(checkpoints["causal"]), "--data.root", str(segmentation)]
    return {
        "probes": ["-c", "configs/demo/probes.yaml", *model, "--trainer.accelerator", "cpu"],
        "llava_bidir": tiny_models.training_arguments(parts, conversations),
    }


SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch executed"}}
STRATEGY = {
    "class_path": "lightning.pytorch.strategies.DDPStrategy",
    "init_args": {"find_unused_parameters": SYSTEM},
}


FOREIGN = {"class_path": "foreign.Callback"}


@pytest.mark.parametrize(
    ("package", "config", "named"),
    [
        ("probes", {"data": {"options": {"background": SYSTEM}}}, "background"),
        ("probes", {"data": {"options": {"background": FOREIGN}}}, "background"),
        ("probes", {"trainer": {"callbacks": [FOREIGN]}}, "'foreign.Callback' is not allowed"),
        ("llava_bidir", {"trainer": {"strategy": STRATEGY}}, "os.system"),
        ("llava_bidir", {"trainer": {"callbacks": "foreign.Callback"}}, "a file of --import"),
    ],
)
def test_a_config_neither_calls_nor_imports_what_it_names(
    package, config, named, arguments, tmp_path, monkeypatch, capsys
):
    """Options and strategy settings have type Any: there jsonargparse called whatever a class_path names."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "foreign.py").write_text("from lightning import Callback")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("os.system", lambda command: pytest.fail("executed"))
    main = {"probes": probes.cli.main, "llava_bidir": llava_bidir.cli.main}[package]
    words = [
        "fit",
        *arguments[package],
        "-c",
        str(tmp_path / "c.yaml"),
        "--out",
        str(tmp_path / "run"),
    ]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert named in f"{stop.value}{capsys.readouterr().err}"
    assert "foreign" not in sys.modules


def test_settings_in_a_checkpoint_make_no_classes(arguments, tmp_path, capsys):
    """Lightning would merge them into the parsed config."""
    import torch

    call = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path / 'executed'}"}}
    torch.save({"hyper_parameters": {"head": call}}, tmp_path / "x.ckpt")
    argv = ["fit", *arguments["probes"], "--ckpt_path", str(tmp_path / "x.ckpt")]
    with pytest.raises((SystemExit, KeyError)):  # the checkpoint is not complete either
        probes.cli.main([*argv, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "executed").exists()
    assert "hyperparameters" not in capsys.readouterr().err


@pytest.mark.parametrize(("command", "option"), [("fit", "-c {}"), ("solve", "--config={}")])
def test_a_key_that_occurs_twice_is_noticed_however_the_file_is_named(
    command, option, arguments, tmp_path, capsys
):
    (tmp_path / "c.yaml").write_text("model: {draw: 1}\ndata: {}\nmodel: {draw: 2}\n")
    words = option.format(tmp_path / "c.yaml").split()
    with pytest.raises(SystemExit, match="^2$"):
        probes.cli.main([command, *arguments["probes"], *words])
    assert "the key 'model' occurs twice" in capsys.readouterr().err
