"""Broken configs: errors name the file or the key, and checkpoints are never loaded as pickles."""

import contextlib
import io

import pytest
import tiny_models
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llava_bidir.cli
import llava_bidir.training.cli
import probes.cli
import probes.fit.cli

MAIN = {"probes": probes.cli.main, "llava_bidir": llava_bidir.cli.main}
BUILD = {"probes": probes.fit.cli.build_cli, "llava_bidir": llava_bidir.training.cli.build_cli}


@pytest.fixture
def arguments(
    parts,
    conversations,
    checkpoints,
    segmentation,
) -> dict[str, list[str]]:
    """Valid arguments of `fit` by package."""
    model = ["--model.mllm", str(checkpoints["causal"]), "--data.root", str(segmentation)]
    return {
        "probes": ["-c", "configs/demo/probes.yaml", *model, "--trainer.accelerator", "cpu"],
        "llava_bidir": tiny_models.training_arguments(parts, conversations),
    }


def config_error(package: str, argv: list[str]) -> str | None:
    """Return the error of a config, ours or the parser's; None if it is accepted."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            BUILD[package](argv, run=False)
    except ValueError as error:  # UserError
        return str(error)
    return None


SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch executed"}}
DDP = {
    "class_path": "lightning.pytorch.strategies.DDPStrategy",
    "init_args": {"find_unused_parameters": SYSTEM},
}
LAMBDA = {
    "class_path": "lightning.pytorch.callbacks.LambdaCallback",
    "init_args": {"on_fit_start": "os.system"},
}
CALLS = [
    ("probes", {"data": {"options": {"background": SYSTEM}}}),
    ("probes", {"data": {"options": SYSTEM}}),
    ("probes", {"trainer": {"callbacks": [SYSTEM]}}),
    ("llava_bidir", {"trainer": {"strategy": DDP}}),
    ("llava_bidir", {"trainer": {"callbacks": [LAMBDA]}}),
    ("llava_bidir", {"model": {"lora": SYSTEM}}),
]


@pytest.mark.parametrize(("package", "config"), CALLS)
def test_config_makes_only_classes_of_declared_kinds(
    package,
    config,
    arguments,
    tmp_path,
    monkeypatch,
):
    """Options and strategy settings have type Any: there jsonargparse calls whatever a class_path names."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("os.system", lambda command: pytest.fail("executed"))
    message = config_error(package, [*arguments[package], "-c", str(tmp_path / "c.yaml")])
    assert message is not None
    assert any(word in message for word in ("os.system", "LambdaCallback", "does not accept"))


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


@pytest.mark.parametrize("package", MAIN)
def test_weights_only_cannot_be_switched_off(package, arguments, tmp_path):
    with pytest.raises(
        SystemExit, match="--weights_only false is not supported: checkpoints are never loaded"
    ):
        MAIN[package](
            ["fit", *arguments[package], "--out", str(tmp_path), "--weights_only", "false"]
        )


@pytest.mark.parametrize("package", MAIN)
def test_time_limit_that_would_end_as_a_finished_run_is_an_error(package, arguments, tmp_path):
    """Lightning counts the epoch in which it stops as complete: the run was exported, and could not be resumed."""
    with pytest.raises(SystemExit, match="Timer is not supported: .*trainer.max_time"):
        more = f"--out {tmp_path} --trainer.max_time 00:00:00:01".split()
        MAIN[package](["fit", *arguments[package], *more])


def test_bug_keeps_its_traceback(arguments, tmp_path, monkeypatch):
    """Also where Lightning builds the classes: int("x") fails in our code, not in a library."""
    bug = eval("lambda *args, **kwargs: int('x')", {"__name__": "llava_bidir.model.build"})
    for function in (
        "llava_bidir.training.module.build_processor",
        "llava_bidir.training.module.build_model",
    ):
        with (
            monkeypatch.context() as patch,
            pytest.raises(ValueError, match="invalid literal for int") as error,
        ):
            patch.setattr(function, bug)
            llava_bidir.cli.main(["fit", *arguments["llava_bidir"], "--out", str(tmp_path)])
        assert type(error.value) is ValueError


# ------------------------------------------------------------------------------------------------ fuzz
KEYS = {  # keys that start nothing outside the process and take no time, whatever their value
    "probes": [
        *"model.mllm model.image_attention model.untrained model.image_resize model.dtype".split(),
        *"model.sites model.head model.feature_norm model.learning_rate model.betas".split(),
        *"data.root data.dataset data.options data.name data.batch_size data.num_workers".split(),
        *"data.cache_features data.seed trainer.max_epochs trainer.callbacks".split(),
        *"trainer.precision trainer.strategy seed_everything out".split(),
    ],
    "llava_bidir": [
        *"model.encoder model.encoder.name model.encoder.layer model.llm model.trainable".split(),
        *"model.image_attention model.image_resize model.adapter model.learning_rate".split(),
        *"model.betas model.warmup_ratio model.loss_average model.lora model.lora.r".split(),
        *"model.max_new_tokens data.annotations data.images data.template".split(),
        *"data.batch_size data.micro_batch_size data.max_length trainer.max_steps".split(),
        *"trainer.plugins".split(),
    ],
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=5),
    st.sampled_from(
        ["../..", "/", "causal", "lightning.Callback", "${HOME}", "{}", "[1", "class_path"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["class_path", "init_args", "name", "r", "a", ""]), inner, max_size=3
        ),
    ),
    max_leaves=5,
)


@pytest.mark.slow
@pytest.mark.parametrize("package", KEYS)
def test_any_value_at_any_key_works_or_is_an_error_of_the_config(
    package, arguments, tmp_path_factory
):
    file = tmp_path_factory.mktemp("fuzz") / "c.yaml"

    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    @given(key=st.sampled_from(KEYS[package]), value=VALUES)
    def check(key, value):
        for part in reversed(key.split(".")):
            value = {part: value}
        file.write_text(yaml.safe_dump(value), encoding="utf-8")
        config_error(package, [*arguments[package], "-c", str(file)])  # any other exception fails

    check()


@pytest.mark.parametrize("option", ["-c {}", "-c={}", "--config {}", "--config={}"])
@pytest.mark.parametrize("command", ["fit", "solve"])
def test_a_key_that_occurs_twice_is_noticed_however_the_file_is_named(
    command, option, arguments, tmp_path, capsys
):
    (tmp_path / "c.yaml").write_text("model: {draw: 1}\ndata: {}\nmodel: {draw: 2}\n")
    words = option.format(tmp_path / "c.yaml").split()
    with pytest.raises(SystemExit, match="^2$"):
        probes.cli.main([command, *arguments["probes"], *words])
    assert "the key 'model' occurs twice" in capsys.readouterr().err
