"""Training from Python: trainable parts, loss, schedule, validation."""

import json
import pickle
import sys
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training_runs import make_data, make_trainer

from experiments.real.export_steps import ExportSteps
from llava_bidir.common.errors import UserError
from llava_bidir.data.dataset import Instructions
from llava_bidir.model.lora import Lora
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.training.module import LlavaTraining

pytestmark = pytest.mark.numerics

LORA = {"lora": Lora(r=2, alpha=4, dropout=0.0)}


def module(parts, **kwargs) -> LlavaTraining:
    settings = {"trainable": ["adapter", "llm"], "learning_rate": 1e-2, "max_new_tokens": 3}
    return LlavaTraining(*parts, **(settings | kwargs))


def module_with_model(parts, **kwargs) -> LlavaTraining:
    """Return a module with the weights that a run of `fit` starts from."""
    torch.manual_seed(0)
    built = module(parts, **kwargs)
    built.configure_model()
    return built


@pytest.fixture
def fit(parts, conversations, tmp_path):
    """Return a function that trains; it returns the module, (tokens, loss) by micro-batch and the trainer."""

    def run(settings=None, **kwargs):
        torch.manual_seed(0)
        built = module(parts, **(settings or {}))
        trainer = make_trainer(tmp_path, **kwargs)
        losses = []
        step = built.training_step

        def recorded(batch, batch_idx):
            loss = step(batch, batch_idx)
            losses.append((batch["supervised"], loss.item()))
            return loss

        built.training_step = recorded
        trainer.fit(built, datamodule=make_data(conversations, parts))
        return built, losses, trainer

    return run


# ---------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    ("settings", "parts_of_llm", "updates"),
    [
        ({"trainable": ["adapter"]}, set(), 0),
        ({}, {"language_model", "lm_head"}, 0),
        (LORA, {"language_model"}, 42),
    ],
)
def test_a_stage_moves_and_saves_its_parts_and_nothing_else(
    settings, parts_of_llm, updates, parts, fit, tmp_path
):
    """Low-rank updates are A and B of seven linear layers in each of three blocks."""
    built, _, trainer = fit(settings=settings)
    fresh = module_with_model(parts, **settings)
    pairs = zip(built.model.named_parameters(), fresh.model.parameters(), strict=True)
    moved = {name for (name, after), before in pairs if not torch.equal(after, before)}
    kinds = {name.removeprefix("model.").split(".")[0] for name in moved}
    assert kinds == {"multi_modal_projector"} | parts_of_llm
    of_llm = [name for name in moved if "multi_modal_projector" not in name]
    assert updates in (0, len(of_llm))
    assert sum(".lora_A." in name or ".lora_B." in name for name in moved) == updates
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"model.{name}" for name in moved}


def test_text_only_batch_trains_and_gives_the_adapter_zero_gradients(parts, conversations):
    """If one rank had no gradients, the others would wait for them."""
    built = module_with_model(parts)
    samples = Instructions(conversations / "data.json", conversations)
    batch = make_data(conversations, parts).collate([samples[10], samples[11]])
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
    loss = module_with_model(parts).loss(make_data(conversations, parts).collate([sample]))
    assert loss == 0


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(
    parts, conversations, tmp_path
):
    built = module(parts, warmup_ratio=0.0)
    loss = built.loss
    seen = []

    def nan_in_step_2(batch):
        seen.append(batch["ids"])
        if len(seen) == 3:
            seen.append({n: p.detach().clone() for n, p in built.model.named_parameters()})
        return loss(batch) * (float("nan") if len(seen) > 2 else 1.0)

    built.loss = nan_in_step_2
    with pytest.raises(UserError, match=r"loss is not finite at step 1: samples ") as error:
        make_trainer(tmp_path).fit(built, datamodule=make_data(conversations, parts))
    assert str(error.value).endswith(", ".join(seen[2]))
    for name, parameter in built.model.named_parameters():
        assert torch.equal(parameter, seen[3][name]), name


def test_schedule_warms_up_and_falls_to_zero_over_all_steps(parts, conversations, tmp_path):
    rates = []
    built = module(parts, warmup_ratio=0.4, adapter_learning_rate=1e-4)
    built.on_before_optimizer_step = lambda optimizer: rates.append(
        [group["lr"] for group in optimizer.param_groups]
    )
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(built, datamodule=make_data(conversations, parts))
    adapter, llm = zip(*rates, strict=True)
    assert len(llm) == 6, "12 samples in batches of 4, twice"
    assert llm[0] == 0
    assert llm.index(max(llm)) == 3
    assert max(llm) == pytest.approx(1e-2)
    assert max(adapter) == pytest.approx(1e-4), "a rate of its own"
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == pytest.approx(0)


def test_gradients_can_be_clipped_in_mixed_precision(fit):
    """Lightning cannot clip gradients of a fused optimizer in mixed precision."""
    _, losses, trainer = fit(gradient_clip_val=0.1, precision="bf16-mixed")
    assert len(losses) == 6
    assert not trainer.optimizers[0].param_groups[0]["fused"]


def test_the_loss_of_a_step_is_the_mean_over_its_micro_batches(fit):
    """It was that of the last one."""
    _, losses, trainer = fit({"loss_average": "tokens"})
    tokens, means = zip(*losses[-2:], strict=True)
    assert trainer.callback_metrics["train/loss"] == pytest.approx(sum(means) / 2)
    assert trainer.callback_metrics["train/supervised_tokens"] == sum(tokens)
    assert len({*tokens}) == len({*means}) == 2


# ---------------------------------------------------------------------------------------------------- checkpoints
def test_models_are_exported_on_the_way_with_the_weights_of_their_step(fit, tmp_path):
    """Compared with the checkpoint of that step; two micro-batches are a step, and three steps an epoch."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)
    fit(enable_checkpointing=True, callbacks=[ExportSteps([2]), save])
    exported = LlavaBidirForConditionalGeneration.from_pretrained(tmp_path / "steps/2/hf")
    weights = exported.state_dict()
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    for name, weight in saved.items():
        assert torch.equal(weights[name.removeprefix("model.")], weight), name


# ---------------------------------------------------------------------------------------------------- validation
def test_validation_needs_questions(parts, conversations, tmp_path):
    """Lightning would end with success and no metric."""
    with pytest.raises(UserError, match="data.val_annotations is not set, so there are no quest"):
        make_trainer(tmp_path).validate(module(parts), datamodule=make_data(conversations, parts))


def test_validation_counts_right_answers(parts, conversations, tmp_path):
    """Five answers of twelve are given as in the records."""
    built = module(parts)
    file = conversations / "data.json"
    right = [record["conversations"][1]["value"] for record in json.loads(file.read_text())[:5]]
    answers = iter(right + ["no"] * 7)
    built.answer = lambda prompts: [next(answers) for _ in prompts["input_ids"]]
    data = make_data(conversations, parts, val_annotations=str(file))
    metrics = make_trainer(tmp_path).validate(built, datamodule=data, verbose=False)[0]
    assert metrics["val/answer_accuracy"] == pytest.approx(5 / 12)


def questions(folder, parts, ranks: int = 1, rank: int = 0, **kwargs) -> list[dict]:
    """Return the validation batches of a rank."""
    data = make_data(folder, parts, **kwargs)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)
    data.setup("validate")
    return list(data.val_dataloader())


def test_validation_asks_the_first_question_and_rejects_records_without_an_answer(parts, tmp_path):
    """A first turn from gpt is dropped, as in training."""
    asked, answered = tiny_models.turns("sky", "wall")
    greeting = {"from": "gpt", "value": "hello"}
    empty = {"from": "gpt", "value": ""}

    def first_batch(*conversations):
        records = [{"id": f"r{i}", "conversations": turns} for i, turns in enumerate(conversations)]
        (tmp_path / "val.json").write_text(json.dumps(records))
        return questions(tmp_path, parts, val_annotations=str(tmp_path / "val.json"))[0]

    batch, plain = (first_batch([*before, asked, answered]) for before in ([greeting], []))
    assert batch["answers"] == ["wall"]
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert torch.equal(batch["prompts"]["input_ids"], plain["prompts"]["input_ids"])
    # the first answer is compared, so that a later one does not help
    for unanswered in ([asked], [asked, empty, asked, answered]):
        with pytest.raises(UserError, match="record 1 has no first answer to compare with"):
            first_batch([asked, answered], unanswered)


def test_what_workers_are_given_can_be_pickled(parts, conversations):
    """As where processes are not forked by default, on macOS and in Python 3.14."""
    file = str(conversations / "data.json")
    data = make_data(conversations, parts, num_workers=1, val_annotations=file)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)
    data.setup("validate")
    loader = data.val_dataloader()
    given = [loader.dataset, loader.collate_fn, loader.worker_init_fn]
    samples, collate, _ = pickle.loads(pickle.dumps(given))
    batch, expected = collate([samples[0]]), loader.collate_fn([loader.dataset[0]])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_records_are_truncated_to_the_positions_of_the_llm(parts, conversations):
    """LLaVA truncates to its tokenizer's model_max_length."""
    assert module(parts).max_positions == 512
    file = str(conversations / "data.json")
    for positions, expected in ((19, 19), (sys.maxsize, 21)):
        batches = questions(conversations, parts, val_annotations=file, max_positions=positions)
        assert max(batch["input_ids"].shape[1] for batch in batches) == expected


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_validation_gives_every_rank_as_many_samples_and_counts_each_once(
    ranks, parts, conversations
):
    """Under ZeRO-3 a rank with one more batch would deadlock; a sample counted twice would shift the metrics."""
    file = conversations / "data.json"
    settings = {"val_annotations": str(file), "micro_batch_size": 5}
    batches = [
        questions(conversations, parts=parts, ranks=ranks, rank=rank, **settings)
        for rank in range(ranks)
    ]
    assert (
        len({tuple(len(batch["ids"]) for batch in rank_batches) for rank_batches in batches}) == 1
    )
    counted = [batch for rank_batches in batches for batch in rank_batches]
    answers = [answer for batch in counted for answer in batch["answers"]]
    records = json.loads(file.read_text())
    assert sorted(answers) == sorted(record["conversations"][1]["value"] for record in records)
    samples = Instructions(file, conversations)
    together = make_data(conversations, parts).collate([samples[i] for i in range(12)])
    assert sum(batch["supervised"] for batch in counted) == together["supervised"]
