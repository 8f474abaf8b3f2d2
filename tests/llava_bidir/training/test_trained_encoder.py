"""A vision tower that trains: what of it, that it is seen to, that nothing of it is lost, and what is refused."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from lightning import Callback
from processes import run_ranks
from run_bytes import assert_same_export
from safetensors.torch import load_file
from training_runs import make_data, make_trainer, points
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaForConditionalGeneration

import probes
from llava_bidir.cli import main
from llava_bidir.common.errors import UserError
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.lora import Lora
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.model.trainable import set_train_mode, set_trainable
from llava_bidir.training import module as training_module
from llava_bidir.training.module import LlavaTraining

pytestmark = pytest.mark.numerics

ALL = ["encoder", "adapter", "llm"]
TOWER = "model.vision_tower."
BLOCK = TOWER + "encoder.layers."
LAYERS = 4  # of which layer -2 reads three


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> tuple[Encoder, str]:
    """Parts with an encoder of four blocks."""
    folder = tmp_path_factory.mktemp("deep")
    encoder, llm = tiny_models.write_parts(folder)
    config = tiny_models.vision_config()
    config.num_hidden_layers = LAYERS
    CLIPVisionModel(config).save_pretrained(encoder.path)
    return replace(encoder, layer=-2), llm


def build(parts, **settings) -> LlavaTraining:
    torch.manual_seed(0)
    return LlavaTraining(*parts, **{"trainable": ALL, "learning_rate": 1e-2} | settings)


def train(built: LlavaTraining, conversations, folder, **settings) -> LlavaTraining:
    data = make_data(conversations, (built.encoder, built.hparams.llm))
    make_trainer(folder, **settings).fit(built, datamodule=data)
    return built


def expected_of(encoder_blocks: int | None) -> set[str]:
    """Return prefixes of the tower's weights that train."""
    first = 0 if encoder_blocks is None else LAYERS - 1 - encoder_blocks
    prefixes = {f"{BLOCK}{i}." for i in range(first, LAYERS - 1)}
    if encoder_blocks is None:
        prefixes |= {f"{TOWER}embeddings.", f"{TOWER}pre_layrnorm."}
    return prefixes


# ---------------------------------------------------------------------------------------------------- what trains
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"encoder_blocks": 1, "lora": Lora(r=2, alpha=4, dropout=0.0), "frozen_dtype": "bfloat16"},
        {"encoder_blocks": 2, "gradient_checkpointing": True},
    ],
)
def test_what_is_read_of_the_last_blocks_moves_and_nothing_else(
    settings, deep, conversations, tmp_path
):
    """Neither the block after the layer nor the final norm train; nor is there a state of them."""
    precision = "bf16-mixed" if "lora" in settings else "32-true"
    before = build(deep, **settings)
    before.configure_model()
    built = train(build(deep, **settings), conversations, tmp_path, precision=precision)
    old = dict(before.model.named_parameters())
    moved = {name for name, p in built.model.named_parameters() if not torch.equal(p, old[name])}
    prefixes = tuple(expected_of(settings.get("encoder_blocks")))
    tower = {name for name, _ in built.model.named_parameters() if name.startswith(TOWER)}
    trained = {name for name in tower if name.startswith(prefixes)}
    assert {name for name in moved if name in tower} == trained
    assert {
        n for n, p in built.model.named_parameters() if p.requires_grad and n in tower
    } == trained
    optimizer = built.trainer.optimizers[0]
    with_state = {id(p) for p in optimizer.state}
    names = {name for name, p in built.model.named_parameters() if id(p) in with_state}
    assert {name for name in names if name in tower} == trained
    rates = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert rates["encoder"] == pytest.approx(2e-3)


def saved_bytes(model, pixels: torch.Tensor, blocks: int) -> int:
    """Return the bytes that the tower keeps for its backward pass without its weights, if its last blocks train."""
    set_trainable(model, ALL if blocks else ALL[1:], blocks or None)
    set_train_mode(model)
    tower = model.model.vision_tower
    sizes = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tower(pixels, output_hidden_states=[-2])
    weights = {p.untyped_storage().data_ptr() for p in tower.parameters()}
    return sum(sizes[address].nbytes() for address in sizes.keys() - weights)


@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_are_kept_of_the_blocks_that_train_and_no_others(recomputed, deep):
    """With recomputation the input of each, f32[2, 5, 16]."""
    built = build(deep, gradient_checkpointing=recomputed)
    built.configure_model()
    none, one, two = (saved_bytes(built.model, tiny_models.pixels(2), n) for n in (0, 1, 2))
    assert none == 0
    assert two == 2 * one
    assert one == 4 * 2 * 5 * 16 if recomputed else one > 0


@pytest.mark.nightly
def test_activations_of_a_clip_l_are_those_of_the_blocks_that_train(deep, tmp_path):
    """Of 24 blocks 23 are read, the last with the embeddings; f32[1, 257, 1024] of each if it is recomputed."""
    settings = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    sizes = {"num_attention_heads": 16, "image_size": 224, "patch_size": 14}
    CLIPVisionConfig(**settings | sizes).save_pretrained(tmp_path)
    built = build((replace(deep[0], path=str(tmp_path)), deep[1]))
    built.build(with_weights=False)
    pixels = torch.randn(1, 3, 224, 224)
    state = 4 * 257 * 1024
    for recomputed in (False, True):
        if recomputed:
            tower = built.model.model.vision_tower
            tower.activation_checkpointing_enable({"use_reentrant": False})
        held = {n: saved_bytes(built.model, pixels, n) for n in (0, 1, 2, 6, 12, 23)}
        print(f"recomputed {recomputed}: {held}")
        one = held[1]
        assert [held[n] for n in (0, 2, 6, 12)] == [0, 2 * one, 6 * one, 12 * one]
        assert 23 * one <= held[23] < 25 * one
        assert one == state if recomputed else one < 25 * state


def test_dropout_is_on_in_the_blocks_that_train_only(deep):
    built = build(deep, encoder_blocks=2)
    built.configure_model()
    built.on_fit_start()
    tower = built.model.model.vision_tower
    assert [layer.training for layer in tower.encoder.layers] == [False, True, True, False]
    assert not tower.training


def test_gradients_are_those_of_the_model_without_what_is_not_read(deep, conversations):
    """Computed by a tower that ends with the layer that is read, of which all weights train."""
    built = build(deep, gradient_checkpointing=True)
    built.configure_model()
    built.on_fit_start()
    pixels = tiny_models.pixels(2)
    probe = torch.randn(2, tiny_models.TOKENS, 32)
    features = torch.stack([*built.model.get_image_features(pixels).pooler_output])
    (features * probe).sum().backward()
    config = tiny_models.vision_config()
    config.num_hidden_layers = LAYERS - 1
    short = CLIPVisionModel(config)
    tower = built.model.model.vision_tower
    short.load_state_dict(tower.state_dict(), strict=False)
    states = short(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    (built.model.model.multi_modal_projector(states) * probe).sum().backward()
    theirs = dict(short.named_parameters())
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)
    assert [n for n, p in theirs.items() if p.grad is None] == [
        "post_layernorm.weight",
        "post_layernorm.bias",
    ]


# ---------------------------------------------------------------------------------------------------- it is seen
def left_out(*parts: str):
    """Return an optimizer builder that leaves parts out."""
    original = training_module.build_optimizer

    def build_optimizer(model, **kwargs):
        trained = [
            p for n, p in model.named_parameters() if n.startswith(parts) and p.requires_grad
        ]
        for parameter in trained:
            parameter.requires_grad_(False)
        optimizer = original(model, **kwargs)
        for parameter in trained:
            parameter.requires_grad_(True)
        return optimizer

    return build_optimizer


def test_a_tower_without_a_graph_ends_the_run(deep, conversations, tmp_path):
    built = build(deep)
    built.configure_model()
    tower = built.model.model.vision_tower
    tower.forward = torch.no_grad()(tower.forward)
    with pytest.raises(UserError, match="encoder, but none of its weights has a gradient"):
        train(built, conversations, tmp_path)


@pytest.mark.parametrize(("part", "prefix"), [("encoder", TOWER), ("llm", "model.language_model.")])
def test_a_part_that_is_not_in_the_optimizer_ends_the_run(
    part, prefix, deep, conversations, tmp_path, monkeypatch
):
    monkeypatch.setattr(training_module, "build_optimizer", left_out(prefix, "lm_head"))
    with pytest.raises(UserError, match=f"{part}, but none of its weights has moved"):
        train(build(deep), conversations, tmp_path)


def test_a_frozen_weight_that_moves_ends_the_run(deep, conversations, tmp_path):
    built = build(deep, trainable=["adapter"])
    built.configure_model()
    original = built.optimizer_step

    def step(*args, **kwargs):
        original(*args, **kwargs)
        with torch.no_grad():
            built.model.lm_head.weight[0, 0] += 1

    built.optimizer_step = step
    with pytest.raises(UserError, match="1 weights that do not train have changed, e.g. lm_head"):
        train(built, conversations, tmp_path)


# ---------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": ["encoder", "adapter"]}, "the encoder trains in stage 2, with the LLM"),
        ({"template": "plain"}, "the encoder trains in stage 2, with the LLM"),
        ({"encoder_blocks": 4}, "encoder_blocks 4: expected at most 3, the blocks before"),
        ({"trainable": ["adapter"], "encoder_blocks": 1}, "encoder_blocks needs encoder in"),
        ({"trainable": ["adapter"], "encoder_learning_rate": 0.1}, "encoder_learning_rate needs"),
    ],
)
def test_what_cannot_train_is_refused_before_weights_are_loaded(settings, message, deep):
    with pytest.raises(UserError, match=message):
        build(deep, **settings)


# ---------------------------------------------------------------------------------------------------- nothing is lost
@pytest.fixture(scope="module")
def command(deep, conversations) -> list[str]:
    encoder, _ = deep
    options = (
        "--model.trainable [encoder,adapter,llm] --trainer.max_epochs 2 --model.encoder.layer -2"
    )
    options += " --data.micro_batch_size 2 --data.val_annotations null --model.learning_rate 0.01"
    options += " --trainer.log_every_n_steps 1"
    return ["fit", *tiny_models.training_arguments(deep, conversations), *options.split()]


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    main([*command, "--out", str(run)])
    return run


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_tower(command, undisturbed, tmp_path):
    """Killed with -9 inside the second epoch, after the checkpoint of the first."""

    class Kill(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 4:
                os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        original = LlavaTraining.configure_callbacks
        LlavaTraining.configure_callbacks = lambda self: [*original(self), Kill()]
        main([*command, "--out", str(tmp_path / "run")])

    codes, log = run_ranks(killed, tmp_path, 1)
    assert codes == [-9], log
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert any(name.startswith(f"model.{TOWER}") for name in saved["state_dict"])
    main([*command, "--out", str(tmp_path / "run"), "--ckpt_path", "last"])
    assert_same_export(tmp_path / "run/hf", undisturbed / "hf")


@pytest.mark.slow
@torch.no_grad()
def test_an_export_has_the_features_of_training_without_the_published_encoder(
    deep, undisturbed, tmp_path, monkeypatch
):
    """Also as a stock llava, and read as an encoder to train on; none has those of the published one."""
    saved = torch.load(undisturbed / "checkpoints/last.ckpt", weights_only=True)
    built = build(deep)
    built.configure_model()
    published = built.model.get_image_features(tiny_models.pixels(2)).pooler_output
    built.load_state_dict(saved["state_dict"], strict=False)
    trained = built.model.eval().get_image_features(tiny_models.pixels(2)).pooler_output
    main(["export", str(undisturbed), str(tmp_path / "llava"), "--as-llava"])
    encoder = Path(deep[0].path)
    moved = encoder.rename(encoder.with_name("gone"))
    try:
        folder = str(undisturbed / "hf")
        ours = LlavaBidirForConditionalGeneration.from_pretrained(folder)
        stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
        again = build((replace(deep[0], path=folder), folder), adapter=folder)
        again.configure_model()
    finally:
        moved.rename(encoder)
    for model in (ours, stock, again.model):
        features = model.eval().get_image_features(tiny_models.pixels(2)).pooler_output
        for one, expected, before in zip(features, trained, published, strict=True):
            assert torch.equal(one, expected)
            assert not torch.allclose(one, before, atol=1e-3)


@pytest.mark.slow
def test_an_adapter_of_a_trained_tower_wants_that_tower(command, undisturbed, tmp_path):
    folder = str(undisturbed / "hf")
    options = ["--model.adapter", folder, "--model.llm", folder, "--out", str(tmp_path / "run")]
    with pytest.raises(
        SystemExit, match=f"with its encoder, .* give --model.encoder.path {folder}"
    ):
        main([*command, *options])
    options += ["--model.encoder.path", folder, "--trainer.max_steps", "1"]
    options += ["--model.learning_rate", "0", "--model.adapter_learning_rate", "0"]
    main([*command, *options])
    before, after = (
        load_file(f / "model.safetensors") for f in (undisturbed / "hf", tmp_path / "run/hf")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_probes_see_another_model(deep, undisturbed):
    """The states are those of training; the identity is that of the files."""
    folder = undisturbed / "hf"
    frozen = probes.load(str(folder))
    pixels = tiny_models.pixels(1)
    states = frozen.states(pixels, ["encoder"])["encoder"]
    expected = LlavaBidirForConditionalGeneration.from_pretrained(folder).model.vision_tower(
        pixels, output_hidden_states=True
    )
    assert torch.equal(states, expected.hidden_states[-2][:, 1:])
    published = CLIPVisionModel.from_pretrained(deep[0].path)
    assert not torch.equal(
        states, published(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    )


@pytest.mark.slow
def test_what_trains_is_logged_and_summed_up(deep, undisturbed, command, capsys):
    """The last block and the final norm do not train."""
    (share,) = {value for _, value in points(undisturbed, "trains/encoder_moved")}
    assert 0.9 < share <= 1
    assert points(undisturbed, "trains/encoder_gradient")[0][1] > 0
    main(["verify-data", "--json", *command[1:]])
    parts = {part["part"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
    tower = CLIPVisionModel.from_pretrained(deep[0].path)
    unread = (*tower.encoder.layers[-1].parameters(), *tower.post_layernorm.parameters())
    total = sum(p.numel() for p in tower.parameters())
    assert parts["encoder"]["parameters"] == total
    assert parts["encoder"]["trained"] == total - sum(p.numel() for p in unread)
    assert all(part["trains"] for part in parts.values())
