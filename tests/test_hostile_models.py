"""Checkpoints that somebody else made: nothing in them is executed, and what is wrong with them is named."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import llava_bidir.cli
import probes
import probes.cli
from llava_bidir.common.hf_loading import read_pretrained

MARKER = "executed"


class Payload:
    """An object that writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.write_text, (Path(self.marker), "x")


def poisoned(file: Path, marker: Path, kind: str = "torch") -> None:
    """What would write `marker` if it was unpickled, as torch writes it or as a bare pickle."""
    content = {"state_dict": {}, "hyper_parameters": {"image_attention": "causal"}, "weight": Payload(marker)}
    torch.save(content, file) if kind == "torch" else file.write_bytes(pickle.dumps(content))


def test_the_payload_works(tmp_path):
    """Else the tests below would show nothing."""
    for kind in ("torch", "pickle"):
        poisoned(tmp_path / "x.bin", tmp_path / MARKER, kind)
        torch.load(tmp_path / "x.bin", weights_only=False) if kind == "torch" else pickle.loads(
            (tmp_path / "x.bin").read_bytes()
        )
        assert (tmp_path / MARKER).exists()
        (tmp_path / MARKER).unlink()


@pytest.fixture
def place(tmp_path, parts, checkpoints, conversations, segmentation):
    """All that commands read, in copies that may be spoilt."""
    shutil.copytree(Path(parts[0].path).parent, tmp_path / "parts")
    shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    encoder, llm = tmp_path / "parts/encoder", tmp_path / "parts/llm"
    from llava_bidir.model.encoders import Encoder

    copies = (Encoder("clip", str(encoder), layer=-1), str(llm))
    picture = str(conversations / "pictures/0.png")
    return {
        "root": tmp_path,
        "hf": tmp_path / "hf",
        "encoder": encoder,
        "llm": llm,
        "trainable": ["fit", *tiny_models.training_arguments(copies, conversations), "--out", str(tmp_path / "run")],
        "generate": ["generate", str(tmp_path / "hf"), picture, "sky", "--max-new-tokens", "2"],
        "states": ["states", str(tmp_path / "hf"), picture, "--out", str(tmp_path / "s.safetensors")],
        "probe": ["fit", "-c", "configs/demo/probes.yaml", "--model.mllm", str(tmp_path / "hf"), "--data.root"]
        + [str(segmentation), "--out", str(tmp_path / "probes")],
    }


def refused(main, argv: list[str]) -> str:
    """The message of a command that must fail by our own words."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert isinstance(stop.value.code, str), "an error of ours, not argparse's usage"
    return stop.value.code


def only_pickles(directory: Path) -> Path:
    """Takes the safetensors away; what is put there instead is the checkpoint's only weights."""
    for file in directory.glob("*.safetensors"):
        file.unlink()
    return directory / "pytorch_model.bin"


PICKLES = {  # entry point: (what is replaced, command)
    "generate": lambda p: (only_pickles(p["hf"]), llava_bidir.cli.main, p["generate"]),
    "states": lambda p: (only_pickles(p["hf"]), probes.cli.main, p["states"]),
    "probes fit": lambda p: (only_pickles(p["hf"]), probes.cli.main, p["probe"]),
    "encoder": lambda p: (only_pickles(p["encoder"]), llava_bidir.cli.main, p["train"]),
    "llm": lambda p: (only_pickles(p["llm"]), llava_bidir.cli.main, p["train"]),
    "adapter": lambda p: (
        only_pickles(p["hf"]),
        llava_bidir.cli.main,
        [*p["train"], "--model.adapter", str(p["hf"])],
    ),
    "safetensors": lambda p: (p["hf"] / "model.safetensors", probes.cli.main, p["states"]),
    "fit --ckpt_path": lambda p: (
        p["root"] / "x.ckpt",
        llava_bidir.cli.main,
        [*p["train"], "--ckpt_path", str(p["root"] / "x.ckpt")],
    ),
    "probes fit --ckpt_path": lambda p: (
        p["root"] / "x.ckpt",
        probes.cli.main,
        [*p["probe"], "--ckpt_path", str(p["root"] / "x.ckpt")],
    ),
    "export": lambda p: (
        p["root"] / "x.ckpt",
        llava_bidir.cli.main,
        ["export", str(p["root"] / "x.ckpt"), str(p["root"] / "out")],
    ),
}


@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize("entry", PICKLES)
def test_pickled_code_is_never_executed(entry, kind, place):
    file, main, argv = PICKLES[entry](place)
    poisoned(file, place["root"] / MARKER, kind)
    message = refused(main, argv)
    assert not (place["root"] / MARKER).exists() and not (place["root"] / "out").exists()
    assert str(file) in message or str(file.parent) in message, message


CODE = f"""from pathlib import Path
Path(__file__).with_name({MARKER!r}).write_text("x")
Path({{marker!r}}).write_text("x")
"""


@pytest.mark.parametrize("model_type", [None, "made_up"])
@pytest.mark.parametrize("entry", ["generate", "states", "sites", "probes fit", "encoder", "llm", "adapter"])
def test_code_in_a_directory_is_never_executed(entry, model_type, place, monkeypatch):
    """auto_map of config, model, tokenizer and processors, under a type that transformers knows and one that it does
    not, custom_generate/, and a user who would say yes if asked."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    directory = {"encoder": place["encoder"], "llm": place["llm"]}.get(entry, place["hf"])
    marker = place["root"] / MARKER
    (directory / "custom_generate").mkdir()
    for name in ("modeling.py", "evil.py", "custom_generate/generate.py", "__init__.py"):
        (directory / name).write_text(CODE.replace("{marker!r}", repr(str(marker))))
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoTokenizer")
    evil = {kind: "evil.Evil" for kind in (*kinds, "AutoProcessor", "AutoImageProcessor")}
    names = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    for name in names:
        facts = json.loads((directory / name).read_text()) if (directory / name).is_file() else {}
        facts["auto_map"] = evil | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]} if "tok" in name else evil
        if name == "config.json" and model_type:
            facts["model_type"] = model_type
        if facts.keys() != {"auto_map"}:
            (directory / name).write_text(json.dumps(facts))
    commands = {"generate": place["generate"], "states": place["states"], "sites": ["sites", str(place["hf"])]}
    commands |= {"probes fit": place["probe"], "adapter": [*place["train"], "--model.adapter", str(place["hf"])]}
    main = (probes if entry in ("states", "sites", "probes fit") else llava_bidir).cli.main
    try:
        main(commands.get(entry, place["train"]))
    except SystemExit as stop:
        assert isinstance(stop.code, str) and (model_type or entry == "adapter"), stop.code
    assert not marker.exists() and not list(place["root"].rglob(f"**/{MARKER}"))


# ------------------------------------------------------------------------------------------------ damaged directories
def rewritten(**changes):
    """Changes config.json; a__b is the key b inside of a."""

    def spoil(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        for key, value in changes.items():
            inside, _, last = key.rpartition("__")
            (config[inside] if inside else config)[last] = value
        (directory / "config.json").write_text(json.dumps(config))

    return spoil


def content(name: str, data: bytes):
    return lambda directory: (directory / name).write_bytes(data)


def weights(change):
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    return spoil


def drop(part: str):
    return weights(lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name])


def indexed(file: str):
    """The same weights behind an index that says they are in `file`."""

    def spoil(directory: Path) -> None:
        names = list(load_file(directory / "model.safetensors"))
        shutil.copy(directory / "model.safetensors", directory.parent / "outside.safetensors")
        (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, file)}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DAMAGES = {  # what is wrong: (how it came about, what the error says)
    "no config": (lambda directory: (directory / "config.json").unlink(), "holds no config.json"),
    "not JSON": (content("config.json", b"{"), r"config.json: JSONDecodeError"),
    "not UTF-8": (content("config.json", b"\xff\xfe"), r"config.json: UnicodeDecodeError"),
    "deep JSON": (content("config.json", DEEP), r"config.json: RecursionError"),
    "array": (content("config.json", b"[]"), r"config.json: holds a list; expected an object"),
    "huge JSON": (content("config.json", b" " * 10_000_001), r"config.json: 10,000,001 bytes"),
    "no kind": (content("config.json", b"{}"), "hf: Unrecognized model"),
    "unknown kind": (
        rewritten(model_type="nope"),
        "needs code that lies in it, and code found in a checkpoint is never executed",
    ),
    "kind of a wrong type": (rewritten(model_type=["llava"]), "hf: TypeError: unhashable"),
    "labels without end": (rewritten(text_config__num_labels=10**9), "num_labels is 1,000,000,000; no model has more"),
    "layers without end": (rewritten(text_config__num_hidden_layers=10**9), "num_hidden_layers is 1,000,000,000"),
    "wider than its weights": (
        rewritten(text_config__hidden_size=10**9),
        r"it describes [\d,]+ parameters, but the wei",
    ),
    "negative width": (rewritten(text_config__hidden_size=-32), "hf: "),
    "width is text": (rewritten(text_config__hidden_size="big"), "Field 'hidden_size' expected int, got str"),
    "no heads": (rewritten(text_config__num_attention_heads=0), "ZeroDivisionError"),
    "no layers": (rewritten(text_config__num_hidden_layers=0), "layers of the LLM: 0; expected 1 or more"),
    "layers too many": (rewritten(text_config__num_hidden_layers=4), r"lacks 9 tensors, .*layers.3.* for one"),
    "layers too few": (rewritten(text_config__num_hidden_layers=2), r"has more layers than its config.*layers.2"),
    "no patches": (rewritten(vision_config__patch_size=0), "config.json of .*ZeroDivisionError"),
    "image tokens without end": (rewritten(image_seq_length=10**8), "10000 x 10000 image tokens; expected 1 to 128"),
    "no weights": (lambda directory: (directory / "model.safetensors").unlink(), "holds no weights"),
    "weights cut short": (content("model.safetensors", b"\x08" + bytes(100)), "model.safetensors is damaged; take ano"),
    "header without end": (content("model.safetensors", (2**60).to_bytes(8, "little")), "model.safetensors is damaged"),
    "no LLM": (drop("language_model"), "parameters, but the weights have"),
    "no adapter": (drop("multi_modal_projector"), r"lacks 4 tensors, model.multi_modal_projector.*for one"),
    "one tensor missing": (drop("layers.1.mlp.up_proj"), r"lacks 1 tensors, .*layers.1.mlp.up_proj.weight for one"),
    "another shape": (
        weights(lambda tensors: tensors.update({"language_model.lm_head.weight": torch.zeros(3, 3)})),
        r"has other shapes than its config says, in 1 tensors, lm_head.weight",
    ),
    "not finite": (
        weights(lambda tensors: tensors["multi_modal_projector.linear_1.bias"].fill_(float("nan"))),
        r"numbers that are not finite in 1 tensors, model.multi_modal_projector.linear_1.bias",
    ),
    "index to elsewhere": (indexed("../outside.safetensors"), r"index.json: .* which is no file beside it"),
    "index to nothing": (indexed("gone.safetensors"), r"'gone.safetensors', which is no file beside it"),
    "no vocabulary": (lambda directory: (directory / "tokenizer.json").unlink(), "holds no vocabulary"),
    "damaged tokenizer": (content("tokenizer.json", b'{"model": 3}'), "tokenizer: .*hf: "),
    "damaged processor": (
        content("processor_config.json", b"{"),
        "preprocessor_config.json of .*processor_config.json",
    ),
    "template that reaches for Python": (
        content("chat_template.jinja", b"{{ ''.__class__.__mro__[1].__subclasses__() }}<image>"),
        "chat template of .*SecurityError",
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


def test_checkpoint_behind_an_index_loads(checkpoints, tmp_path):
    shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    indexed("model-00001-of-00001.safetensors")(tmp_path / "hf")
    assert probes.load(str(tmp_path / "hf")).sites


@pytest.mark.parametrize(
    ("which", "what", "key"),
    [
        ("llm", "one tensor missing", "model.llm"),
        ("llm", "not JSON", "config.json"),
        ("llm", "no vocabulary", "model.llm"),
        ("encoder", "no weights", "holds no weights"),
        ("encoder", "header without end", "encoder/model.safetensors is damaged"),
        ("hf", "no adapter", "has no tensor named multi_modal_projector"),
    ],
)
def test_damaged_parts_end_training_before_it_begins(which, what, key, place):
    DAMAGES[what][0](place[which])
    argv = [*place["train"], "--model.adapter", str(place["hf"])] if which == "hf" else place["train"]
    assert key in refused(llava_bidir.cli.main, argv)
    assert not list((place["root"] / "run").glob("checkpoints/*")) and not (place["root"] / "run/hf").exists()


@pytest.mark.parametrize("what", ["no LLM", "not finite", "header without end", "not JSON", "no vocabulary"])
def test_damaged_checkpoint_answers_nothing(what, place):
    DAMAGES[what][0](place["hf"])
    assert str(place["hf"]) in refused(llava_bidir.cli.main, place["generate"])


def test_patches_without_size_are_named(parts, tmp_path):
    from llava_bidir.model.encoders import Encoder

    shutil.copytree(parts[0].path, tmp_path / "encoder")
    for size, message in ((0, "ZeroDivisionError"), (-4, "make -2 a side"), (9, "make 0 a side of 8 px; expected 1")):
        rewritten(patch_size=size)(tmp_path / "encoder")
        with pytest.raises(ValueError, match=message):
            Encoder("clip", str(tmp_path / "encoder")).load_config()


def test_a_hub_id_that_is_nowhere_is_no_directory(monkeypatch):
    from transformers import AutoConfig

    with pytest.raises(ValueError, match="MLLM: 'no/such' is neither a checkpoint directory nor a model that the hub"):
        read_pretrained("MLLM", AutoConfig, "no/such")


# ------------------------------------------------------------------------------------------------ ZeRO
def zero_checkpoint(path: Path, content, universal: bool) -> Path:
    """Files as ZeRO leaves them, complete and with sizes that agree."""
    inside = path / "checkpoint" / ("zero/model.weight" if universal else "")
    inside.mkdir(parents=True)
    file = inside / ("fp32.pt" if universal else "mp_rank_00_model_states.pt")
    torch.save(content, file)
    if universal:
        (path / "latest_universal").write_text("checkpoint")
    else:
        sizes = {str(file.relative_to(path)): file.stat().st_size}
        facts = {"world_size": 1, "stage": 2, "precision": "32-true", "trained": [], "bytes": sizes}
        (path / "whole.json").write_text(json.dumps(facts))
    return path


@pytest.mark.parametrize("universal", [False, True])
def test_code_in_zero_checkpoints_is_never_executed(universal, place):
    """DeepSpeed itself loads them as pickles."""
    from llava_bidir.common.checkpoint_io import find_defect

    plain = zero_checkpoint(place["root"] / "plain.ckpt", {"weight": torch.ones(2)}, universal)
    assert find_defect(plain) is None
    evil = zero_checkpoint(place["root"] / "evil.ckpt", {"weight": Payload(place["root"] / MARKER)}, universal)
    message = refused(llava_bidir.cli.main, [*place["train"], "--ckpt_path", str(evil)])
    assert str(evil) in message and "holds code: loading it would call" in message
    if not universal:
        pytest.importorskip("deepspeed")
        refused(llava_bidir.cli.main, ["export", str(evil), str(place["root"] / "out")])
    assert not (place["root"] / MARKER).exists() and not (place["root"] / "out").exists()


def test_newest_whole_checkpoint_is_passed_over_if_it_holds_code(tmp_path, caplog):
    from llava_bidir.common.checkpoint_io import latest_valid_checkpoint

    good = zero_checkpoint(tmp_path / "a.ckpt", {"weight": torch.ones(2)}, False)
    poisoned(tmp_path / "b.ckpt", tmp_path / MARKER)
    with caplog.at_level("WARNING"):
        assert latest_valid_checkpoint(tmp_path) == good
    assert "b.ckpt holds code" in caplog.text and not (tmp_path / MARKER).exists()


class Lookup:
    """Pickled as a call of getattr, as Python 3.11.2 does with a member of an enumeration."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_getattr_is_let_through_for_stages_of_zero_and_nothing_else(tmp_path):
    from llava_bidir.common.checkpoint_io import find_unsafe_globals

    stages = pytest.importorskip("deepspeed.runtime.zero.config").ZeroStageEnum

    def judged(*lookups: Lookup) -> str | None:
        torch.save({"stages": [stages.weights, *lookups, stages.gradients]}, tmp_path / "state.pt")
        return find_unsafe_globals(tmp_path)

    member = Lookup(stages, "weights")
    assert judged(member, member, Lookup(stages, "gradients")) is None
    for other in (Lookup(stages, "__getattribute__"), Lookup(stages, "mro"), Lookup([], "append")):
        assert "holds code: loading it would call builtins.getattr" in judged(member, other)
        assert "holds code" in judged(other, member)
