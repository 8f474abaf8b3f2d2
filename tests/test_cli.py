"""Commands: their help, what bad usage answers, and the small ones from end to end."""

import argparse
import json
import re
import shutil
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import run_bytes
import tiny_models
import torch
from processes import run_command
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

import llava_bidir.cli
import probes.cli
from llava_bidir import LlavaBidirForConditionalGeneration
from probes.run_config import DataOptions, ModelOptions

HEAVY = ("torch", "transformers", "lightning", "pandas", "sklearn", "matplotlib")
MAIN = {"llava_bidir": llava_bidir.cli.main, "probes": probes.cli.main}


BIDIRECTIONAL = ("--model.image_attention", "bidirectional")


def export_again(run: Path) -> str:
    """Export the checkpoint of a run into RUN/again, check that this equals the run's export, and return its path."""
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    llava_bidir.cli.main(["export", str(checkpoint), str(run / "again")])
    run_bytes.assert_same_export(run / "hf", run / "again")
    return str(checkpoint)


def subparsers(package: str) -> dict[str, argparse.ArgumentParser]:
    parser = {"llava_bidir": llava_bidir, "probes": probes}[package].cli.build_parser()
    return next(
        action.choices
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    )


COMMANDS = {package: list(subparsers(package)) for package in MAIN}
ALL = [(package, command) for package, commands in COMMANDS.items() for command in commands]


@pytest.mark.parametrize(("package", "command"), ALL)
def test_each_command_has_help_that_explains_every_option(package, command, capsys):
    with pytest.raises(SystemExit) as stop:
        MAIN[package]([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "usage:" in text
    assert len(text) > 200
    assert not [action.dest for action in subparsers(package)[command]._actions if not action.help]


HELP_OF_ALL = f"""
HEAVY = {HEAVY}
import importlib, sys
main = importlib.import_module(sys.argv[1] + ".cli").main
for command in sys.argv[2:]:
    sys.argv = ["x", *command.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end
    heavy = [name for name in HEAVY if name in sys.modules]
    assert not heavy, (command, heavy)
"""


@pytest.mark.parametrize("package", COMMANDS)
def test_help_imports_nothing_heavy(package):
    """In a process of its own, like a typing error's answer."""
    done = run_command([sys.executable, "-c", HELP_OF_ALL, package, "", *COMMANDS[package]])
    assert all(command in done.stdout.partition("options:")[0] for command in COMMANDS[package]), (
        "of all at once"
    )


# commands whose options LightningCLI defines
OF_LIGHTNING = {"llava_bidir": [*llava_bidir.cli.HELP], "probes": ["fit"]}


@pytest.mark.parametrize("command", llava_bidir.cli.HELP)
def test_short_help_has_options_and_defaults_of_the_parser(command, capsys):
    package = "llava_bidir"
    page = llava_bidir.cli.HELP[command]
    everything = ""
    for name in {command, "fit"}:  # whose options the others take
        with pytest.raises(SystemExit):
            MAIN[package]([name, "--help-all"])
        everything += capsys.readouterr().out
    entries = {entry.split()[0].rstrip(","): entry for entry in re.split(r"\n  (?=-)", everything)}
    entries |= {"-c": ""}
    for option, text in page.options.items():
        name = option.split()[0]
        default = re.search(r"\(default: (.*)\)$", text)
        assert name in entries, option
        if default and name.startswith(("--model", "--data", "--out", "--overwrite", "--trainer")):
            found = re.findall(r"default: ([^)]*)\)", " ".join(entries[name].split()))
            assert found[-1].lower() == default[1], (option, found)


@pytest.mark.parametrize("package", COMMANDS)
def test_the_list_of_options_is_that_of_the_parsers(package, capsys):
    """By which misspelt ones are found before the parsers are imported."""
    found = set()
    for command in OF_LIGHTNING[package]:
        with pytest.raises(SystemExit):
            MAIN[package]([command, "--help-all"])
        entries = [
            line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("-")
        ]
        found |= set(re.findall(r"(?<![\w.-])--[a-zA-Z][\w.-]*\w\+?", "\n".join(entries)))
    file = Path(package) / "options.txt"
    assert file.read_text().split() == sorted(found), f"{file} is outdated"


ONE_OF_EACH_PARSER = [("llava_bidir", "fit")]
ONE_OF_EACH_PARSER += [("probes", name) for name in ("fit", "solve", "study")]


def test_options_of_a_run_are_those_that_lightning_parses(capsys):
    """A field of `run_config.py` that `ProbeModule` or `ProbeDataModule` did not take would have no effect."""
    with pytest.raises(SystemExit):
        probes.cli.main(["fit", "--help-all"])
    text = capsys.readouterr().out
    options = {f"model.{field.name}" for field in fields(ModelOptions)}
    options |= {f"data.{field.name}" for field in fields(DataOptions)}
    assert not [name for name in options if f"--{name} " not in text]


MISSPELT = """
import sys
from {package}.cli import main
for words in {words}:
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 2, end
print([name for name in {heavy} if name in sys.modules])
"""


@pytest.mark.parametrize(("package", "command"), ONE_OF_EACH_PARSER)
def test_misspelt_keys_and_options_are_told_at_once(package, command, tmp_path):
    """What defines them takes seconds to import."""
    (tmp_path / "mine.yaml").write_text("data: {rot: x}\n")
    more = ["M", "D", "--out", "O"] * (command == "study")
    options = "--trainer.logger.project p --trainer.logger+=CSVLogger"
    options += " --trainer.nonsense 1 --seed_everythin=1"
    words = [
        [command, *more, "-c", str(tmp_path / "mine.yaml")],
        [command, *more, *options.split()],
    ]
    code = MISSPELT.format(package=package, words=words, heavy=HEAVY)
    done = run_command([sys.executable, "-c", code])
    assert f"{tmp_path}/mine.yaml: there is no option 'data.rot'" in done.stderr
    assert package == "llava_bidir" or "did you mean 'data.root'?" in done.stderr
    assert "unrecognized arguments: --trainer.nonsense --seed_everythin=1\n" in done.stderr
    assert done.stdout == "[]\n", done.stdout


@pytest.mark.parametrize("package", COMMANDS)
def test_each_command_runs_what_exists(package):
    """Commands name their function by text, to be imported when they run; those that take YAML have parsers of their
    own and name none."""
    named = {command: parser.get_default("run") for command, parser in subparsers(package).items()}
    for command, run in named.items():
        module, _, function = (run or "builtins:print").partition(":")
        assert callable(getattr(import_module(module), function)), command
    assert sum(run is not None for run in named.values()) > 3


NO_TRAINING = {"lightning", "deepspeed", "datasets", "torchmetrics", "sklearn", "umap"}
CLASSES_OF_MODELS = {
    "transformers.modeling_utils"
}  # that of all models, beside config and tokenizer
# Commands with parsers of their own, and names of the package, by the module that they lead to.
MODULES = {
    "solve": "probes.training.solve.command",
    "study": "probes.studies.command",
    "verify-data": "probes.data.verify_command",
    "probes.study": "probes.studies.run",
    "probes.solve_features": "probes.training.solve.features",
    "probes.load": "probes.models.load",
}
# Commands, and what their modules must not import. One process imports them in this order, so that no line forbids what
# a line above it may import.
NOT_NEEDED = (
    ("probes", "demo", NO_TRAINING | {"torch", "numpy"}),
    ("probes", "lab", NO_TRAINING | {"torch", "starlette"}),
    (
        "probes",
        "study probes.solve_features verify-data",
        NO_TRAINING | {"transformers", "matplotlib", "pandas", "scipy.stats"},
    ),
    ("llava_bidir", "vqa vqa-table", NO_TRAINING | {"transformers", "matplotlib", "pandas"}),
    (
        "probes",
        "questions starvation umap segment",
        NO_TRAINING | {"transformers", "matplotlib", "pandas", "scipy.stats"},
    ),
    ("probes", "report", NO_TRAINING | {"transformers", "pandas", "scipy.stats"}),
    (
        "probes",
        "sites states mask probes.study",
        NO_TRAINING | CLASSES_OF_MODELS | {"pandas", "scipy.stats"},
    ),
    (
        "probes",
        "probes.load solve",
        NO_TRAINING | {"pandas", "scipy.stats", "tensorboard"},
    ),
    ("llava_bidir", "generate", NO_TRAINING),
    (
        "probes",
        "demo-assets knockout routes patching maps",
        NO_TRAINING,
    ),
)
IMPORT_IN_ORDER = """
import importlib, json, sys
for modules in json.loads(sys.argv[1]):
    for module in modules:
        importlib.import_module(module)
    print(*sys.modules)
"""


def test_commands_import_only_what_they_need():
    modules = [
        [
            MODULES.get(command)
            or subparsers(package)[command].get_default("run").partition(":")[0]
            for command in commands.split()
        ]
        for package, commands, _ in NOT_NEEDED
    ]
    done = run_command([sys.executable, "-c", IMPORT_IN_ORDER, json.dumps(modules)])
    imported = [set(line.split()) for line in done.stdout.splitlines()]
    for (package, commands, unwanted), names in zip(NOT_NEEDED, imported, strict=True):
        assert not unwanted & names, f"{package} {commands}"


@pytest.mark.parametrize("package", COMMANDS)
def test_a_program_has_a_version_and_without_a_command_its_help(package, capsys):
    for words in (["--version"], [COMMANDS[package][0], "--version"]):
        with pytest.raises(SystemExit) as stop:
            MAIN[package](words)
        assert stop.value.code == 0
        assert capsys.readouterr().out.split()[1] == llava_bidir.__version__
    with pytest.raises(SystemExit) as stop:
        MAIN[package]([])
    text = "".join(capsys.readouterr())
    assert stop.value.code == 2
    assert all(command in text for command in COMMANDS[package])


def test_missing_records_are_named_before_a_model_is_looked_up(tmp_path):
    """README's command, typed without data, tried to reach the hub for 40 seconds."""
    words = "fit -c stage1 -c clip --model.encoder.path no/encoder"
    words += f" --data.annotations {tmp_path}/none.json --data.images {tmp_path}"
    with pytest.raises(SystemExit, match="data.annotations: no file .*none.json"):
        llava_bidir.cli.main([*words.split(), "--out", str(tmp_path / "run")])


def test_sites_names_what_states_returns(
    checkpoints,
    segmentation,
    tmp_path,
    capsys,
):
    checkpoint = str(checkpoints["bidirectional"])
    probes.cli.main(["sites", checkpoint])
    text = capsys.readouterr().out
    images = [str(segmentation / f"images/validation/00{i}.png") for i in range(2)]
    probes.cli.main(["states", checkpoint, *images, "--out", str(tmp_path / "s.safetensors")])
    states = load_file(tmp_path / "s.safetensors")
    assert "bidirectional image attention" in text
    assert "2 x 2 = 4 image tokens" in text
    for site, state in states.items():
        assert f"{site} " in text
        assert state.shape[:2] == (2, 4)
    assert set(states) == set(probes.load(checkpoint).sites)


def test_file_name_of_another_kind_is_an_error_before_anything_is_read():
    with pytest.raises(SystemExit, match=r"FILE\.pt: expected a file name .* ends in .safetensors"):
        probes.cli.main("states MODEL IMAGE --out FILE.pt".split())


def test_verify_data_shows_what_is_fed(parts, conversations, capsys):
    argv = ["verify-data", *tiny_models.training_arguments(parts, conversations), *BIDIRECTIONAL]
    llava_bidir.cli.main([*argv, "--json", "--show", "0", "11"])
    picture, text = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert picture["id"] == "r0"
    assert picture["template"] == "vicuna_v1"
    ((start, end),) = picture["image_spans"]
    assert end - start == tiny_models.TOKENS
    assert len(set(picture["input_ids"][start:end])) == 1
    assert len(picture["labels"]) == len(picture["input_ids"])
    assert picture["text"].count("<image>") == 1
    assert text["image_spans"] == []
    assert "<image>" not in text["text"]
    llava_bidir.cli.main([*argv, "--show", "0"])
    shown = capsys.readouterr().out
    assert "trained [wall</s>]" in shown
    assert "<4 image tokens>" in shown
    assert [line.split()[2:] for line in shown.splitlines()[-3:]] == [
        ["\\", ".", "."],
        ["#", "#", "."],
        ["#", "#", "\\"],
    ]
    with pytest.raises(SystemExit, match="--show 12: .* has records 0..11"):
        llava_bidir.cli.main([*argv, "--show", "12"])


def test_fit_exports_a_model_that_generate_and_export_agree_on(
    parts,
    conversations,
    tmp_path,
    capsys,
):
    run = tiny_models.fit(parts, conversations, tmp_path / "run", *BIDIRECTIONAL)
    facts = json.loads((run / "hf/training.json").read_text())
    assert facts["stage"] == "adapter+llm"
    assert facts["steps"] == 3
    assert 0 <= facts["val/answer_accuracy"] <= 1
    checkpoint = export_again(run)
    for command in ("validate", "test"):  # the checkpoint answers as it did when its training ended
        capsys.readouterr()
        words = [
            command,
            *tiny_models.training_arguments(parts, conversations),
            *BIDIRECTIONAL,
            "--out",
            str(tmp_path / command),
            "--ckpt_path",
            checkpoint,
        ]
        llava_bidir.cli.main(words)
        assert str(facts["val/answer_accuracy"])[:5] in capsys.readouterr().out
    picture = str(conversations / "pictures/0.png")
    capsys.readouterr()
    llava_bidir.cli.main(
        ["generate", str(run / "hf"), picture, "sky", "name the wall", "--max-new-tokens", "3"]
    )
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "sky"
    assert shown[2] == "name the wall"


def test_a_model_trained_in_its_own_chat_template_is_asked_in_it(
    parts,
    conversations,
    tmp_path,
    capsys,
    monkeypatch,
):
    encoder, llm = parts
    llm = shutil.copytree(llm, tmp_path / "llm")
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + eos_token }}{% endfor %}"
    (llm / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    arguments = tiny_models.training_arguments((encoder, str(llm)), conversations)
    arguments += ["--data.template", "chat", "--trainer.max_steps", "1"]
    llava_bidir.cli.main(["verify-data", *arguments, "--show", "0"])
    assert "assistant:\n\n  trained [wall</s>]" in capsys.readouterr().out
    llava_bidir.cli.main(["fit", *arguments, "--out", str(tmp_path / "run")])
    export_again(tmp_path / "run")

    prompts = []
    original = LlavaBidirForConditionalGeneration.generate

    def recorded(model, **inputs):
        return prompts.append(inputs["input_ids"].tolist()[0]) or original(model, **inputs)

    monkeypatch.setattr(LlavaBidirForConditionalGeneration, "generate", recorded)
    picture = str(conversations / "pictures/0.png")
    llava_bidir.cli.main(
        ["generate", str(tmp_path / "run/hf"), picture, "name the sky", "--max-new-tokens", "3"]
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/hf")
    text = f"<s>user:\n{'<image>' * tiny_models.TOKENS}\nname the sky</s>assistant:\n"
    assert prompts == [tokenizer.encode(text, add_special_tokens=False)]
    mllm = probes.load(str(tmp_path / "run/hf"))
    assert prompts[0][: len(mllm.ids[0])] == mllm.ids[0].tolist()
    assert prompts[0][len(mllm.ids[0]) :] == mllm.chat.question_ids("name the sky")
    (llm / "chat_template.jinja").unlink()
    with pytest.raises(
        SystemExit, match="data.template chat: the tokenizer of .* has no chat template"
    ):
        llava_bidir.cli.main(["verify-data", *arguments])


def test_checkpoint_of_stage_2_is_exported_without_the_model_of_stage_1(
    parts, conversations, tmp_path
):
    def fit(name: str, *more: str) -> Path:
        return tiny_models.fit(
            parts, conversations, tmp_path / name, "--trainer.max_steps", "1", *more
        )

    adapter = fit("stage1", "--model.adapter_init_scale", "4") / "hf"
    run = fit("run", "--model.adapter", str(adapter))
    shutil.rmtree(adapter)
    export_again(run)
    facts = json.loads((run / "again/training.json").read_text())
    assert facts["adapter"] == str(adapter)
    assert facts["adapter_init_scale"] == 4


@pytest.mark.parametrize("frozen", ["float32", "bfloat16"])
def test_lora_is_merged_into_what_is_exported(
    frozen,
    parts,
    conversations,
    tmp_path,
):
    """Frozen weights keep the dtype that they had in training, in the run's own export and in that of a checkpoint."""
    more = f"--model.lora.r 2 --model.lora.alpha 64 --model.frozen_dtype {frozen}"
    more += " --trainer.precision bf16-mixed --trainer.gradient_clip_val null"
    run = tiny_models.fit(parts, conversations, tmp_path / "run", *more.split())
    export_again(run)
    written = load_file(run / "again/model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in written)
    before = LlamaForCausalLM.from_pretrained(parts[1]).state_dict()
    name = "layers.1.mlp.down_proj.weight"
    merged = next(tensor for key, tensor in written.items() if key.endswith(name))
    assert merged.dtype == getattr(torch, frozen)
    assert (merged - before[f"model.{name}"]).abs().max() > 1e-3, "it has learned"


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_goes_missing_ends_training_with_its_record_named(workers, parts, tmp_path):
    """Nothing takes its place."""
    folder = tiny_models.write_conversations(tmp_path)
    (folder / "pictures/3.png").unlink()
    more = f"--data.val_annotations null --data.num_workers {workers}"
    message = r"^llava-bidir: record 3 \(id .r3.\): .*pictures/3.png cannot be read as an image: .*No such file.*"
    with pytest.raises(SystemExit, match=message):
        tiny_models.fit(parts, folder, tmp_path / "run", *more.split())


def test_data_is_loaded_where_processes_are_not_forked_by_default(
    parts,
    conversations,
    tmp_path,
    spawn,
):
    tiny_models.fit(parts, conversations, tmp_path, "--data.num_workers", "1")
    assert json.loads((tmp_path / "hf/training.json").read_text())["steps"] == 3


def test_tensorboard_has_what_a_run_should_show(parts, conversations, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = "--trainer.log_every_n_steps 1 --throughput.peak_tflops 1"
    tiny_models.fit(parts, conversations, tmp_path, *more.split())
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    of_training = "loss grad_norm supervised_tokens samples_per_s tokens_per_s step_s data_share"
    of_training += " padding_share text_only_share mfu"
    wanted = {f"train/{name}" for name in of_training.split()}
    wanted |= {"val/loss", "val/answer_accuracy", "lr-AdamW/adapter", "lr-AdamW/llm"}
    assert wanted <= set(tags["scalars"])
    assert "hp_metric" not in tags["scalars"], "Lightning's placeholder, always -1"
    assert any("answers" in tag for tag in tags["tensors"])
