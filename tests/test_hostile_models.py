"""Untrusted checkpoints: no code in them is executed, and errors name what is damaged."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import probe_runs
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import llava_bidir.cli
import probes
import probes.cli
from llava_bidir.common.errors import UserError

MARKER = "executed"
MAIN = dict.fromkeys(("train", "adapter", "generate", "export"), llava_bidir.cli.main)
MAIN |= dict.fromkeys(("states", "sites", "probe"), probes.cli.main)


class Payload:
    """An object that writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.write_text, (Path(self.marker), "x")


def poisoned(file: Path, marker: Path, kind: str) -> None:
    """Write a file that writes `marker` when it is unpickled, in torch's format or as a bare pickle."""
    content = {
        "state_dict": {},
        "hyper_parameters": {"image_attention": "causal"},
        "weight": Payload(marker),
    }
    torch.save(content, file) if kind == "torch" else file.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_the_payload_works(kind, tmp_path):
    """Otherwise the tests below would prove nothing."""
    file = tmp_path / "x.bin"
    poisoned(file, tmp_path / MARKER, kind)
    torch.load(file, weights_only=False) if kind == "torch" else pickle.loads(file.read_bytes())
    assert (tmp_path / MARKER).exists()


@pytest.fixture
def place(tmp_path, parts, checkpoints, conversations, segmentation):
    """Copies of everything that commands read."""
    shutil.copytree(Path(parts[0].path).parent, tmp_path / "parts")
    shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    encoder = replace(parts[0], path=str(tmp_path / "parts/encoder"))
    llm = tmp_path / "parts/llm"
    picture = str(conversations / "pictures/0.png")
    train = ["fit", *tiny_models.training_arguments((encoder, llm), conversations)]
    train += ["--out", str(tmp_path / "run")]
    return {
        "root": tmp_path,
        "hf": tmp_path / "hf",
        "encoder": tmp_path / "parts/encoder",
        "llm": llm,
        "train": train,
        "adapter": [*train, "--model.adapter", str(tmp_path / "hf")],
        "generate": f"generate {tmp_path}/hf {picture} sky --max-new-tokens 2".split(),
        "states": f"states {tmp_path}/hf {picture} --out {tmp_path}/s.safetensors".split(),
        "sites": f"sites {tmp_path}/hf".split(),
        "export": f"export {tmp_path}/x.ckpt {tmp_path}/out".split(),
        "probe": probe_runs.arguments(tmp_path / "hf", segmentation, tmp_path / "probes"),
    }


def only_pickles(directory: Path) -> Path:
    """Delete the safetensors, and return the path of the pickle that replaces them."""
    for file in directory.glob("*.safetensors"):
        file.unlink()
    return directory / "pytorch_model.bin"


PICKLES = {  # entry point: (what is replaced, command)
    "generate": ("hf", "generate"),
    "states": ("hf", "states"),
    "encoder": ("encoder", "train"),
    "llm": ("llm", "train"),
    "adapter": ("hf", "adapter"),
    "safetensors": ("model.safetensors", "states"),
    "fit --ckpt_path": ("x.ckpt", "train"),
    "probes fit --ckpt_path": ("x.ckpt", "probe"),
    "export": ("x.ckpt", "export"),
}


@pytest.mark.parametrize(
    ("entry", "kind"),
    [*((entry, "torch") for entry in PICKLES), ("states", "pickle"), ("export", "pickle")],
)
def test_pickled_code_is_never_executed(entry, kind, place):
    what, command = PICKLES[entry]
    files = {
        "model.safetensors": place["hf"] / "model.safetensors",
        "x.ckpt": place["root"] / "x.ckpt",
    }
    file = files.get(what) or only_pickles(place[what])
    poisoned(file, place["root"] / MARKER, kind)
    more = ["--ckpt_path", str(file)] * ("--ckpt_path" in entry)
    with pytest.raises(SystemExit) as stop:
        MAIN[command]([*place[command], *more])
    message = stop.value.code
    assert isinstance(message, str), "a UserError, not argparse's usage"
    assert not (place["root"] / MARKER).exists()
    assert not (place["root"] / "out").exists()
    assert str(file) in message or str(file.parent) in message, message


CODE = f"""from pathlib import Path
Path(__file__).with_name({MARKER!r}).write_text("x")
Path({{marker!r}}).write_text("x")
"""


@pytest.mark.parametrize(
    ("entry", "model_type"),
    [
        ("generate", None),
        ("states", None),
        ("sites", None),
        ("encoder", None),
        ("llm", None),
        ("adapter", None),
        ("states", "made_up"),
        ("encoder", "made_up"),
    ],
)
def test_code_in_a_directory_is_never_executed(entry, model_type, place, monkeypatch):
    """auto_map of config, model, tokenizer and processors, with a known and an unknown type; custom_generate/; and a
    user who would confirm a prompt."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    directory = {"encoder": place["encoder"], "llm": place["llm"]}.get(entry, place["hf"])
    marker = place["root"] / MARKER
    (directory / "custom_generate").mkdir()
    for name in ("modeling.py", "evil.py", "custom_generate/generate.py", "__init__.py"):
        (directory / name).write_text(CODE.replace("{marker!r}", repr(str(marker))))
    kinds = "Config Model ModelForCausalLM ModelForImageTextToText Tokenizer Processor"
    evil = {f"Auto{kind}": "evil.Evil" for kind in (*kinds.split(), "ImageProcessor")}
    for name in ("config", "tokenizer_config", "processor_config", "preprocessor_config"):
        file = directory / f"{name}.json"
        if not file.is_file():
            continue
        facts = json.loads(file.read_text()) | {"auto_map": evil}
        if name == "tokenizer_config":
            facts["auto_map"] = evil | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        if name == "config" and model_type:
            facts["model_type"] = model_type
        file.write_text(json.dumps(facts))
    command = entry if entry in MAIN else "train"
    try:
        MAIN[command](place[command])
    except SystemExit as stop:
        assert isinstance(stop.code, str) and (model_type or entry == "adapter"), stop.code
    assert not marker.exists()
    assert not list(place["root"].rglob(f"**/{MARKER}"))


# ------------------------------------------------------------------------------------------------ damaged directories
def rewritten(part: str = "", **changes):
    """Change config.json, or a part of it."""

    def spoil(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (config[part] if part else config).update(changes)
        (directory / "config.json").write_text(json.dumps(config))

    return spoil


def weights(change):
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    return spoil


DAMAGES = {  # damage: (function, error)
    "unknown kind": (rewritten(model_type="nope"), "custom code"),
    "layers too few": (
        rewritten("text_config", num_hidden_layers=2),
        r"more layers than its config, .* in 9 tensors, e.g. .*layers.2",
    ),
    "image tokens without end": (
        rewritten(image_seq_length=10**8),
        "image_seq_length is 100000000, but .* has 4",
    ),
    "a layer that the encoder lacks": (
        rewritten(vision_feature_layer=-4),
        "vision_feature_layer -4: the encoder has 2 layers",
    ),
    "one tensor missing": (
        weights(lambda tensors: tensors.pop("model.language_model.layers.1.mlp.up_proj.weight")),
        r"lacks 1 tensors, e.g. .*layers.1.mlp.up_proj.weight",
    ),
    "another shape": (
        weights(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 3)})),
        r"has shapes that differ from its config in 1 tensors, e.g. lm_head.weight",
    ),
    "not finite": (
        weights(
            lambda tensors: tensors["model.multi_modal_projector.linear_1.bias"].fill_(float("nan"))
        ),
        r"values that are not finite in 1 tensors, e.g. model.multi_modal_projector.linear_1.bias",
    ),
    "no vocabulary": (
        lambda directory: (directory / "tokenizer.json").unlink(),
        "there is no vocabulary",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_checkpoint_is_an_error_that_says_where(what, checkpoints, tmp_path):
    spoil, message = DAMAGES[what]
    shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(ValueError, match=message) as error:
        probes.load(str(tmp_path / "hf"))
    assert str(tmp_path) in str(error.value)


LAYER = rewritten(vision_feature_layer=3)
NAN_ADAPTER, _ = DAMAGES["not finite"]


@pytest.mark.parametrize(
    ("entry", "spoil", "message"),
    [
        ("sites", LAYER, "hf: vision_feature_layer 3: the encoder has 2 layers"),
        ("states", LAYER, "hf: vision_feature_layer 3: the encoder has 2 layers"),
        ("generate", LAYER, "hf: vision_feature_layer 3: the encoder has 2 layers"),
        (
            "generate",
            rewritten(image_token_index=7),
            "7 in config.json, but <image> has the id 332",
        ),
        ("adapter", NAN_ADAPTER, r"hf has values that are not finite in \['linear_1.bias'\]"),
    ],
)
def test_a_damage_is_named_at_each_door(entry, spoil, message, place):
    """Sites of no layer were listed; samples were blamed for NaN; "tokens: 0, features: 6144" was a traceback."""
    spoil(place["hf"])
    with pytest.raises(SystemExit, match=message):
        MAIN[entry](place[entry])


@pytest.fixture
def hub(checkpoints, tmp_path, monkeypatch):
    """The snapshot folder of the hub id org/name in a cache of its own."""
    repository = tmp_path / "hub/models--org--name"
    shutil.copytree(checkpoints["causal"], repository / "snapshots/0123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots/0123"


@pytest.mark.parametrize("what", ["not finite", "pickle"])
def test_hub_ids_are_checked_like_directories(what, hub, tmp_path):
    assert probes.load("org/name").sites
    if what == "pickle":
        poisoned(only_pickles(hub), tmp_path / MARKER, "torch")
    else:
        DAMAGES[what][0](hub)
    with pytest.raises(UserError, match="org/name" if what == "pickle" else DAMAGES[what][1]):
        probes.load("org/name")
    assert not (tmp_path / MARKER).exists()
