"""Training: trainable parts, loss, schedule, validation, and equality of resumed and uninterrupted runs."""

import json
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from llava_bidir.common.checkpoints import Checkpoints
from llava_bidir.common.errors import UserError
from llava_bidir.data.datamodule import InstructionData
from llava_bidir.data.dataset import Instructions
from llava_bidir.model.build import build_processor
from llava_bidir.model.lora import Lora
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.training.callbacks import ExportSteps
from llava_bidir.training.module import LlavaTraining

pytestmark = pytest.mark.numerics

LORA = {
    "lora": Lora(
        r=2,
        alpha=4,
        dropout=0.0,
    )
}
ADAPTER = {"trainable": ["adapter"]}
MICRO_BATCHES = 6  # of an epoch: 12 samples, two of them a micro-batch, two micro-batches a step


def module(parts, **kwargs) -> LlavaTraining:
    settings = {
        "trainable": ["adapter", "llm"],
        "learning_rate": 1e-2,
        "max_new_tokens": 3,
    }
    return LlavaTraining(*parts, **(settings | kwargs))


def module_with_model(parts, **kwargs) -> LlavaTraining:
    """Return a module with the weights that a run of `fit` starts from."""
    torch.manual_seed(0)
    built = module(parts, **kwargs)
    built.configure_model()
    return built


def data(folder, parts, **kwargs) -> InstructionData:
    settings = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "num_workers": 0,
        "group_by_length": True,
    }
    return InstructionData(
        str(folder / "data.json"),
        str(folder),
        processor=build_processor(*parts),
        image_tokens=tiny_models.TOKENS,
        **(settings | kwargs),
    )


def questions(
    folder,
    parts,
    ranks: int = 1,
    rank: int = 0,
    **kwargs,
) -> InstructionData:
    """Return data that is set up for validation on a rank."""
    source = data(folder, parts, **kwargs)
    source.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)
    source.setup("validate")
    return source


def trainer(tmp_path, **kwargs) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "default_root_dir": tmp_path,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(settings | kwargs))


@pytest.fixture
def fit(parts, conversations, tmp_path):
    """Return a function that trains; it returns the module, (ids, loss) of each micro-batch and the trainer."""

    def run(ckpt_path=None, settings=None, **kwargs):
        torch.manual_seed(0)
        built = module(parts, **(settings or {}))
        training = trainer(tmp_path, **kwargs)
        losses = []
        step = built.training_step

        def recorded(batch, batch_idx):
            loss = step(batch, batch_idx)
            losses.append((tuple(batch["ids"]), loss.item()))
            return loss

        built.training_step = recorded
        training.fit(built, datamodule=data(conversations, parts), ckpt_path=ckpt_path)
        return built, losses, training

    return run


def moved_parameters(built: LlavaTraining, fresh: LlavaTraining) -> set[str]:
    pairs = zip(built.model.named_parameters(), fresh.model.parameters(), strict=True)
    return {name for (name, after), before in pairs if not torch.equal(after, before)}


# ---------------------------------------------------------------------------------------------------- parts
@pytest.mark.parametrize(
    ("settings", "parts_of_llm", "updates"),
    [(ADAPTER, set(), 0), ({}, {"language_model", "lm_head"}, 0), (LORA, {"language_model"}, 42)],
)
def test_a_stage_moves_and_saves_its_parts_and_nothing_else(
    settings,
    parts_of_llm,
    updates,
    parts,
    fit,
    tmp_path,
):
    """Low-rank updates are A and B of seven linear layers in each of three blocks."""
    built, _, run = fit(settings=settings)
    moved = moved_parameters(built, module_with_model(parts, **settings))
    kinds = {name.removeprefix("model.").split(".")[0] for name in moved}
    assert kinds == {"multi_modal_projector"} | parts_of_llm
    low_rank = [name for name in moved if ".lora_A." in name or ".lora_B." in name]
    others = [name for name in moved if "multi_modal_projector" not in name]
    assert len(low_rank) == updates
    assert updates in (0, len(others))
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"model.{name}" for name in moved}


# ---------------------------------------------------------------------------------------------------- loss
def test_text_only_batch_trains_and_gives_the_adapter_zero_gradients(parts, conversations):
    """If one rank had no gradients, the others would wait for them."""
    built = module_with_model(parts)
    samples = Instructions(conversations / "data.json", conversations)
    batch = data(conversations, parts).collate([samples[10], samples[11]])
    assert len(batch["image_positions"]) == 0
    assert not batch["pixel_values"].any(), "a black image"
    loss = built.loss(batch)
    loss.backward()
    assert loss > 0
    for parameter in built.model.model.multi_modal_projector.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_batch_without_a_supervised_token_has_zero_loss(parts, conversations):
    sample = Instructions(conversations / "data.json", conversations)[0]
    sample["conversations"][1]["value"] = ""
    loss = module_with_model(parts).loss(data(conversations, parts).collate([sample]))
    assert loss == 0
    assert loss.isfinite()


# ---------------------------------------------------------------------------------------------------- schedule
def test_schedule_warms_up_and_falls_to_zero_over_all_steps(parts, conversations, tmp_path):
    rates = []
    built = module(parts, warmup_ratio=0.4, adapter_learning_rate=1e-4)
    step = built.on_before_optimizer_step

    def recorded(optimizer):
        rates.append([group["lr"] for group in optimizer.param_groups])
        step(optimizer)

    built.on_before_optimizer_step = recorded
    run = trainer(tmp_path, max_epochs=2)
    run.fit(built, datamodule=data(conversations, parts))
    adapter, llm = zip(*rates, strict=True)
    assert run.global_step == len(llm) == 6, "12 samples in batches of 4, twice"
    assert llm[0] == 0
    assert max(llm) == pytest.approx(1e-2)
    assert llm.index(max(llm)) == 3
    assert max(adapter) == pytest.approx(1e-4), "a rate of its own"
    assert run.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == pytest.approx(0)


@pytest.mark.parametrize("limit", [3, 0.5])
def test_limited_epochs_end_the_schedule_and_are_resumed_with_the_samples_of_the_next(
    limit, fit, tmp_path
):
    """The schedule was that of complete epochs; a resumed epoch left out as many samples as the last one had."""
    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    settings = {"max_epochs": 2, "limit_train_batches": limit}
    _, losses, run = fit(
        enable_checkpointing=True,
        callbacks=[save],
        **settings,
    )
    assert run.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == pytest.approx(0)
    _, rest, _ = fit(ckpt_path=tmp_path / "epoch=0.ckpt", **settings)
    assert len(losses) == 6
    assert rest == losses[3:]


@pytest.mark.parametrize(("step", "settings"), [(2, {}), (4, LORA)])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    step,
    settings,
    fit,
    tmp_path,
):
    """A resume that restarts the epoch would train some samples twice and others never."""
    save = ModelCheckpoint(
        tmp_path,
        filename="at",
        every_n_train_steps=step,
        monitor=None,
    )
    hook = save.on_train_batch_end

    def save_once(run, *args):
        if run.global_step == step:
            hook(run, *args)

    save.on_train_batch_end = save_once
    run = {"max_epochs": 2, "settings": settings}
    whole, losses, _ = fit(
        enable_checkpointing=True,
        callbacks=[save],
        **run,
    )
    resumed, rest, _ = fit(ckpt_path=tmp_path / "at.ckpt", **run)
    assert len(losses) == 2 * MICRO_BATCHES
    assert rest == losses[2 * step :]
    assert moved_parameters(whole, resumed) == set()


def test_models_are_exported_on_the_way_with_the_weights_of_their_step(fit, tmp_path):
    """Compared with the checkpoint of that step; two micro-batches are a step, and three steps an epoch."""
    save = ModelCheckpoint(
        tmp_path,
        save_top_k=-1,
        filename="{step}",
        every_n_train_steps=1,
    )
    fit(enable_checkpointing=True, callbacks=[ExportSteps([2]), save])
    assert [folder.name for folder in (tmp_path / "steps").iterdir()] == ["2"]
    exported = LlavaBidirForConditionalGeneration.from_pretrained(tmp_path / "steps/2/hf")
    weights = {f"model.{name}": weight for name, weight in exported.state_dict().items()}
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    for name, weight in saved.items():
        assert torch.equal(weights[name], weight), name
    training = json.loads((tmp_path / "steps/2/hf/training.json").read_text())
    assert training["steps"] == 2


def test_a_checkpoint_within_a_step_is_not_resumed(
    parts,
    conversations,
    tmp_path,
):
    """It lacks the step's first gradients; a ModelCheckpoint of the user's saves after a validation within a step."""
    saving = [Checkpoints(), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)]
    settings = {"enable_checkpointing": True, "val_check_interval": 3}
    questions = str(conversations / "data.json")
    run = trainer(tmp_path, callbacks=saving, **settings)
    run.fit(module(parts), datamodule=data(conversations, parts, val_annotations=questions))
    run = trainer(tmp_path, callbacks=[Checkpoints()], **settings)
    with pytest.raises(UserError, match="saved within a step, whose gradients it lacks"):
        run.fit(
            module(parts),
            datamodule=data(conversations, parts, val_annotations=questions),
            ckpt_path=tmp_path / "step=1.ckpt",
        )


def test_gradients_can_be_clipped_in_mixed_precision(fit):
    """Lightning cannot clip gradients of a fused optimizer in mixed precision."""
    _, losses, run = fit(gradient_clip_val=0.1, precision="bf16-mixed")
    assert len(losses) == MICRO_BATCHES
    assert not run.optimizers[0].param_groups[0]["fused"]


# ---------------------------------------------------------------------------------------------------- settings
def test_settings_that_do_not_fit_are_errors(
    parts,
    conversations,
    tmp_path,
    fit,
):
    cases = {
        r"model.lora needs llm in model.trainable, got \['adapter'\]": lambda: module(
            parts, trainable=["adapter"], **LORA
        ),
        # Lightning would end with success and no metric
        "data.val_annotations is not set, so there are no questions": lambda: trainer(
            tmp_path
        ).validate(module(parts), datamodule=data(conversations, parts)),
    }
    for message, run in cases.items():
        with pytest.raises(ValueError, match=message):
            run()


# ---------------------------------------------------------------------------------------------------- validation
def test_validation_counts_right_answers(parts, conversations, tmp_path):
    """Five answers of twelve are given as in the records."""
    built = module(parts)
    source = data(conversations, parts, val_annotations=str(conversations / "data.json"))
    records = json.loads((conversations / "data.json").read_text())
    right = [record["conversations"][1]["value"] for record in records[:5]]
    answers = iter(right + ["no"] * 7)
    built.answer = lambda prompts: [next(answers) for _ in prompts["input_ids"]]
    metrics = trainer(tmp_path).validate(built, datamodule=source, verbose=False)[0]
    assert metrics["val/answer_accuracy"] == pytest.approx(5 / 12)


def test_validation_asks_the_first_question_and_rejects_records_without_an_answer(parts, tmp_path):
    """A first turn from gpt is dropped, as in training."""
    file = tmp_path / "val.json"
    asked, answered = tiny_models.turns("sky", "wall")
    greeting = {"from": "gpt", "value": "hello"}

    def first_batch(*conversations):
        records = [{"id": f"r{i}", "conversations": turns} for i, turns in enumerate(conversations)]
        file.write_text(json.dumps(records))
        (tmp_path / "data.json").write_text(json.dumps(records[:1]))
        source = questions(tmp_path, parts, val_annotations=str(file))
        return next(iter(source.val_dataloader()))

    batch = first_batch([greeting, asked, answered])
    plain = first_batch([asked, answered])
    assert batch["answers"] == ["wall"]
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert torch.equal(batch["prompts"]["input_ids"], plain["prompts"]["input_ids"])
    message = "val.json: record 1 has no first answer to compare with"
    empty = {"from": "gpt", "value": ""}
    # the first answer is compared, so that a later one does not help
    later = [asked, empty, asked, answered]
    for unanswered in ([asked], [greeting, asked], [asked, empty], later):
        with pytest.raises(ValueError, match=message):
            first_batch([asked, answered], unanswered)


def test_records_are_truncated_to_the_positions_of_the_llm(parts, conversations):
    """LLaVA truncates to its tokenizer's model_max_length."""
    assert module(parts).max_positions == 512
    for positions, expected in ((19, 19), (None, 21)):
        source = questions(
            conversations,
            parts,
            val_annotations=str(conversations / "data.json"),
            max_positions=positions,
        )
        lengths = [batch["input_ids"].shape[1] for batch in source.val_dataloader()]
        assert max(lengths) == expected


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_validation_gives_every_rank_as_many_samples_and_counts_each_once(
    ranks, parts, conversations
):
    """Under ZeRO-3 a rank with one more batch would deadlock; a sample counted twice would shift the metrics."""
    file = str(conversations / "data.json")
    counts = set()
    answers = []
    supervised = 0
    for rank in range(ranks):
        source = questions(
            conversations, parts, ranks, rank, val_annotations=file, micro_batch_size=5
        )
        batches = list(source.val_dataloader())
        counts.add(tuple(len(batch["ids"]) for batch in batches))
        for batch in batches:
            answers += batch["answers"]
            supervised += batch["supervised"]
            assert (batch["labels"][len(batch["answers"]) :] == -100).all(), "repeated samples"
    assert len(counts) == 1
    records = json.loads((conversations / "data.json").read_text())
    assert sorted(answers) == sorted(record["conversations"][1]["value"] for record in records)
    samples = Instructions(file, conversations)
    together = data(conversations, parts).collate([samples[i] for i in range(12)])
    assert supervised == together["supervised"]
