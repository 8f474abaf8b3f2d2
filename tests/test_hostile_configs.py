"""Configs that somebody else wrote: they set values, name classes of the declared kinds, and execute nothing."""

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
import probes.training.cli

SYSTEM = lambda marker: {"class_path": "os.system", "init_args": {"command": f"touch {marker}"}}
POPEN = lambda marker: {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}}
LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
PLACES = {  # a key where a class is expected, or where anything is
    "probes": {
        "trainer.callbacks": lambda bad: {"trainer": {"callbacks": [bad]}},
        "trainer.logger": lambda bad: {"trainer": {"logger": bad}},
        "trainer.strategy": lambda bad: {"trainer": {"strategy": bad}},
        "trainer.plugins": lambda bad: {"trainer": {"plugins": [bad]}},
        "trainer.profiler": lambda bad: {"trainer": {"profiler": bad}},
        "model": lambda bad: {"model": bad},
        "data": lambda bad: {"data": bad},
        "data.options": lambda bad: {"data": {"options": bad}},
        "data.options.background": lambda bad: {"data": {"options": {"background": bad}}},
        "model.variants.a": lambda bad: {"model": {"variants": {"a": bad}}},
        "model.variants.a.head": lambda bad: {"model": {"variants": {"a": {"head": bad}}}},
    },
    "llava_bidir": {
        "model.encoder": lambda bad: {"model": {"encoder": bad}},
        "model.lora": lambda bad: {"model": {"lora": bad}},
        "data.processor": lambda bad: {"data": {"processor": bad}},
        "watch_loss": lambda bad: {"watch_loss": bad},
        "trainer.strategy.init_args": lambda bad: {
            "trainer": {
                "strategy": {
                    "class_path": "lightning.pytorch.strategies.DDPStrategy",
                    "init_args": {"find_unused_parameters": bad},
                }
            }
        },
        "a function": lambda bad: {
            "trainer": {"callbacks": [{"class_path": LAMBDA, "init_args": {"on_fit_start": "os.system"}}]}
        },
        "zero_optimization": lambda bad: {
            "trainer": {
                "strategy": {
                    "class_path": "llava_bidir.training.deepspeed_strategy.ZeRO",
                    "init_args": {"zero_optimization": {"stage": 2, "x": bad}},
                }
            }
        },
    },
}


def arguments(package: str, parts, conversations, checkpoints, segmentation) -> list[str]:
    if package == "llava_bidir":
        return tiny_models.training_arguments(parts, conversations)
    model = ["--model.mllm", str(checkpoints["causal"]), "--data.root", str(segmentation)]
    return ["-c", "configs/demo/probes.yaml", *model, "--trainer.accelerator", "cpu"]


@pytest.fixture(params=PLACES)
def command(request, parts, conversations, checkpoints, segmentation):
    """(package, its function that builds a run, arguments that work)."""
    build = {"probes": probes.training.cli.build_cli, "llava_bidir": llava_bidir.training.cli.build_cli}[request.param]
    return request.param, build, arguments(request.param, parts, conversations, checkpoints, segmentation)


def said(build, argv: list[str]) -> str | None:
    """The error of a config, by us or by the parser; None if it is accepted."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            build(argv, run=False)
    except SystemExit as stop:
        assert stop.code == 2
        return output.getvalue()
    except ValueError as error:
        return str(error)
    return None


CASES = [(package, key, SYSTEM) for package, places in PLACES.items() for key in places]


@pytest.mark.parametrize(("package", "key", "bad"), [*CASES, ("probes", "data.options.background", POPEN)])
def test_no_class_outside_the_declared_kinds_is_made(
    package, key, bad, parts, conversations, checkpoints, segmentation, tmp_path
):
    """`find_unused_parameters`, options and recipes take anything: there jsonargparse calls what a class_path names."""
    marker, file = tmp_path / "executed", tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(PLACES[package][key](bad(marker))))
    build = {"probes": probes.training.cli.build_cli, "llava_bidir": llava_bidir.training.cli.build_cli}[package]
    message = said(build, [*arguments(package, parts, conversations, checkpoints, segmentation), "-c", str(file)])
    assert message is not None and not marker.exists()
    assert any(word in message for word in ("os.system", "subprocess.Popen", "LambdaCallback", "does not accept"))


def test_settings_in_a_checkpoint_make_no_classes_either(checkpoints, segmentation, tmp_path):
    """Lightning would merge them into the config after it was parsed."""
    import torch

    marker = tmp_path / "executed"
    torch.save({"hyper_parameters": {"recipes": {"a": {"head": SYSTEM(marker)}}}}, tmp_path / "x.ckpt")
    argv = ["fit", *arguments("probes", None, None, checkpoints, segmentation), "--ckpt_path", str(tmp_path / "x.ckpt")]
    with pytest.raises((SystemExit, KeyError)):  # it is no whole checkpoint either
        probes.cli.main([*argv, "--out", str(tmp_path / "run")])
    assert not marker.exists()


def test_checkpoints_are_not_loaded_as_pickles_on_request(command, tmp_path):
    package, _, argv = command
    main = {"probes": probes.cli.main, "llava_bidir": llava_bidir.cli.main}[package]
    with pytest.raises(SystemExit, match="--weights_only false: checkpoints are data here"):
        main(["fit", *argv, "--out", str(tmp_path), "--weights_only", "false"])


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {  # what is in the file: what the error says
    "model: !!python/object/apply:os.system ['touch executed']\n": "python/object/apply:os.system",
    "model: !!python/name:os.system\n": "python/name:os.system",
    LAUGHS + "model: {sites: *i}\n": "values with its aliases written out; 100,000 are plenty",
    "a: &a [*a]\nmodel: {sites: *a}\n": "values with its aliases written out",
    "model: {seed: 1}\ndata: {}\nmodel: {seed: 2}\n": "the key 'model' is there twice",
    "model: {learning_rate: 1, learning_rate: 2}\n": "the key 'learning_rate' is there twice",
    "model: {learning_rate: fast}\n": "model.learning_rate",
    "model: [\n": "while parsing a flow node",
    "- 1\n- 2\n": "Unexpected config",
    "text\n": "Unexpected config",
    "": "Unexpected config",
    "[" * 2_000: "recursion",
    "model:\n  head: \udcff\n": "can't decode byte 0xff",
    "\0": "special characters are not allowed",
    "#" * 1_000_001: "1,000,001 bytes, where 1,000,000 are plenty",
}


@pytest.mark.parametrize("text", FILES, ids=[*map(str, range(len(FILES)))])
def test_broken_config_is_an_error_that_says_what(text, checkpoints, segmentation, tmp_path):
    (tmp_path / "c.yaml").write_bytes(text.encode(errors="surrogateescape"))
    argv = arguments("probes", None, None, checkpoints, segmentation)
    message = said(probes.training.cli.build_cli, [*argv, "-c", str(tmp_path / "c.yaml")])
    assert message is not None and FILES[text] in " ".join(message.split()), message


def test_folder_or_missing_file_is_no_config(command, tmp_path):
    for name in ("", "none.yaml"):
        message = said(command[1], [*command[2], "-c", str(tmp_path / name)])
        assert "config" in message and str(tmp_path / name) in message


@pytest.mark.parametrize(("text", "named"), [("{max_steps: null}", "max_steps"), ("{max_steps: -7}", "passed in -7")])
def test_value_that_lightning_stumbles_over_is_an_error_of_the_config(text, named, command, tmp_path):
    (tmp_path / "c.yaml").write_text(f"trainer: {text}\n")
    message = said(command[1], [*command[2], "-c", str(tmp_path / "c.yaml")])
    assert message.startswith("config: ") and named in message


# ------------------------------------------------------------------------------------------------ fuzz
KEYS = {  # what does not reach out, and does not take long whatever its value
    "probes": [
        *("model.mllm model.image_attention model.untrained model.image_resize model.dtype model.sites".split()),
        *("model.head model.feature_norm model.labels model.learning_rate model.betas model.label_stride".split()),
        *("model.variants data.root data.dataset data.options data.name data.batch_size data.cache_features".split()),
        *("data.num_workers data.seed trainer.max_epochs trainer.callbacks trainer.precision".split()),
        *("trainer.strategy seed_everything out".split()),
    ],
    "llava_bidir": [
        *("model.encoder model.llm model.trainable model.image_attention model.image_resize model.adapter".split()),
        *("model.learning_rate model.betas model.warmup_ratio model.loss_average model.lora".split()),
        *("model.max_new_tokens model.encoder.name model.encoder.layer model.lora.r data.annotations".split()),
        *("data.images data.template data.batch_size data.micro_batch_size data.max_length".split()),
        *("trainer.max_steps trainer.plugins watch_loss".split()),
    ],
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=5),
    st.sampled_from(["../..", "/", "causal", "os.system", "lightning.Callback", "${HOME}", "{}", "[1", "class_path"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["class_path", "init_args", "name", "r", "a", ""]), inner, max_size=3),
    ),
    max_leaves=5,
)


@pytest.mark.slow
@pytest.mark.parametrize("package", KEYS)
def test_any_value_at_any_key_works_or_is_an_error_of_the_config(
    package, parts, conversations, checkpoints, segmentation, tmp_path_factory
):
    build = {"probes": probes.training.cli.build_cli, "llava_bidir": llava_bidir.training.cli.build_cli}[package]
    argv = arguments(package, parts, conversations, checkpoints, segmentation)
    file = tmp_path_factory.mktemp("fuzz") / "c.yaml"

    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    @given(key=st.sampled_from(KEYS[package]), value=VALUES)
    def check(key, value):
        for part in reversed(key.split(".")):
            value = {part: value}
        file.write_text(yaml.safe_dump(value), encoding="utf-8")
        said(build, [*argv, "-c", str(file)])  # any other exception fails

    check()
