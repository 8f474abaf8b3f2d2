"""Training: trainable parts, loss, schedule, validation, and equality of resumed and uninterrupted runs."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from llava_bidir.common.progress import LogProgress
from llava_bidir.common.step_boundary import SaveAtStepBoundary
from llava_bidir.data.datamodule import InstructionData
from llava_bidir.data.instruction_dataset import Instructions
from llava_bidir.model.build import build_processor
from llava_bidir.model.lora import Lora
from llava_bidir.training.loss_monitor import LossMonitor
from llava_bidir.training.module import LlavaTraining
from llava_bidir.training.throughput import Throughput

pytestmark = pytest.mark.numerics


def module(parts, **kwargs) -> LlavaTraining:
    settings = {"trainable": ["adapter", "llm"], "learning_rate": 1e-2, "max_new_tokens": 3}
    return LlavaTraining(*parts, **(settings | kwargs))


def module_with_model(parts, **kwargs) -> LlavaTraining:
    """A module with the weights that a run of `fit` starts from."""
    torch.manual_seed(0)
    built = module(parts, **kwargs)
    built.configure_model()
    return built


def data(folder, parts, **kwargs) -> InstructionData:
    settings = {"batch_size": 4, "micro_batch_size": 2, "num_workers": 0, "group_by_length": True}
    return InstructionData(
        str(folder / "data.json"),
        str(folder),
        processor=build_processor(*parts),
        image_tokens=tiny_models.TOKENS,
        **(settings | kwargs),
    )


def trainer(tmp_path, **kwargs) -> Trainer:
    settings = {
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **(settings | {"enable_checkpointing": False} | kwargs),
    )


def fit(parts, folder, tmp_path, ckpt_path=None, module_kwargs=None, **kwargs):
    torch.manual_seed(0)
    built, run = module(parts, **(module_kwargs or {})), trainer(tmp_path, **kwargs)
    losses = []
    step = built.training_step

    def recorded(batch, batch_idx):
        loss = step(batch, batch_idx)
        losses.append((tuple(batch["ids"]), loss.item()))
        return loss

    built.training_step = recorded
    run.fit(built, datamodule=data(folder, parts), ckpt_path=ckpt_path)
    return built, losses, run


@pytest.mark.parametrize("train", [["adapter"], ["adapter", "llm"]])
def test_a_stage_moves_its_parts_and_nothing_else(train, parts, conversations, tmp_path):
    built, _, _ = fit(parts, conversations, tmp_path, module_kwargs={"trainable": train})
    fresh = module_with_model(parts, trainable=train)
    moved = {
        name.split(".")[1] if name.startswith("model.") else "lm_head"
        for (name, a), b in zip(
            built.model.named_parameters(), fresh.model.parameters(), strict=True
        )
        if not torch.equal(a, b)
    }
    assert moved == {"multi_modal_projector"} | (
        {"language_model", "lm_head"} if "llm" in train else set()
    )


def test_new_adapter_is_scaled_and_a_loaded_one_keeps_its_scale(parts, checkpoints, tmp_path):
    one, four = (
        module_with_model(parts, adapter_init_scale=x).model.model.multi_modal_projector
        for x in (1.0, 4.0)
    )
    assert torch.equal(one.linear_2.weight * 4, four.linear_2.weight)
    assert torch.equal(one.linear_1.weight, four.linear_1.weight)
    shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    (tmp_path / "hf/training.json").write_text('{"adapter_init_scale": 4.0}')
    assert module(parts, adapter=str(tmp_path / "hf")).settings()["adapter_init_scale"] == 4.0


def loader(folder, parts):
    return DataLoader(
        Instructions(folder / "data.json", folder), 6, collate_fn=data(folder, parts).collate
    )


def test_text_only_batch_trains_and_gives_the_adapter_zero_gradients(parts, conversations):
    """If one rank had no gradients, the others would wait for them."""
    built = module_with_model(parts)
    samples = [loader(conversations, parts).dataset[i] for i in (10, 11)]
    batch = data(conversations, parts).collate(samples)
    assert batch["pixel_values"] is None
    loss = built.loss(batch)
    loss.backward()
    assert loss > 0
    gradients = [p.grad for p in built.model.model.multi_modal_projector.parameters()]
    assert all(g is not None and not g.any() for g in gradients)


def test_batch_without_a_supervised_token_has_zero_loss(parts, conversations):
    built = module_with_model(parts)
    sample = loader(conversations, parts).dataset[0]
    sample["conversations"] = [sample["conversations"][0], {"from": "gpt", "value": ""}]
    loss = built.loss(data(conversations, parts).collate([sample]))
    assert loss == 0 and loss.isfinite()


def test_schedule_warms_up_and_falls_to_zero_over_all_steps(parts, conversations, tmp_path):
    rates = []
    built = module(parts, warmup_ratio=0.4)
    step = built.on_before_optimizer_step
    built.on_before_optimizer_step = lambda optimizer: (
        rates.append(optimizer.param_groups[0]["lr"]),
        step(optimizer),
    )
    run = trainer(tmp_path, max_epochs=2)
    run.fit(built, datamodule=data(conversations, parts))
    assert run.global_step == len(rates) == 6, "12 samples in batches of 4, twice"
    assert rates[0] == 0 and max(rates) == pytest.approx(1e-2) and rates.index(max(rates)) == 3
    assert run.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == pytest.approx(0)


@pytest.mark.parametrize("limit", [3, 0.5])
def test_limited_epochs_end_the_schedule_and_are_resumed_with_the_samples_of_the_next(
    limit, parts, conversations, tmp_path
):
    """The schedule was that of complete epochs; a resumed epoch left out as many samples as the last one had."""
    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    settings = {"max_epochs": 2, "limit_train_batches": limit}
    _, losses, run = fit(
        parts, conversations, tmp_path, enable_checkpointing=True, callbacks=[save], **settings
    )
    assert run.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == pytest.approx(0)
    _, rest, _ = fit(
        parts, conversations, tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt", **settings
    )
    assert len(losses) == 6 and rest == losses[3:]


def test_adapter_can_have_its_own_learning_rate(parts, conversations, tmp_path):
    built, _, run = fit(
        parts, conversations, tmp_path, module_kwargs={"adapter_learning_rate": 1e-4}
    )
    assert [(g["name"], g["initial_lr"]) for g in run.optimizers[0].param_groups] == [
        ("adapter", 1e-4),
        ("llm", 1e-2),
    ]


LORA = {"lora": Lora(r=2, alpha=4, dropout=0.0)}


@pytest.mark.parametrize(("step", "settings"), [(2, {}), (3, {}), (4, LORA)])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    step, settings, parts, conversations, tmp_path
):
    """A resume that restarts the epoch would train some samples twice and others never."""
    save = ModelCheckpoint(
        tmp_path, filename="at", every_n_train_steps=step, save_top_k=1, monitor=None
    )
    hook = save.on_train_batch_end
    save.on_train_batch_end = lambda run, *args: (
        hook(run, *args) if run.global_step == step else None
    )
    run = {"max_epochs": 2, "module_kwargs": settings}
    uninterrupted, losses, _ = fit(
        parts, conversations, tmp_path, enable_checkpointing=True, callbacks=[save], **run
    )
    resumed, rest, _ = fit(parts, conversations, tmp_path, ckpt_path=tmp_path / "at.ckpt", **run)
    assert len(losses) == 12 and rest == losses[2 * step :], "two micro-batches a step"
    for (name, a), b in zip(
        uninterrupted.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_validation_within_a_step_saves_no_checkpoint(
    parts, conversations, tmp_path, monkeypatch
):
    """A resume would lose the step's first gradients, and group all later micro-batches into other steps."""
    save = ModelCheckpoint(tmp_path, save_top_k=-1)
    callbacks = [SaveAtStepBoundary(), save]
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks, val_check_interval=3)
    within, write = [], run.save_checkpoint
    accumulates = lambda: run.fit_loop.epoch_loop._should_accumulate()
    monkeypatch.setattr(
        run, "save_checkpoint", lambda *args: within.append(accumulates()) or write(*args)
    )
    run.fit(
        module(parts),
        datamodule=data(conversations, parts, val_annotations=str(conversations / "data.json")),
    )
    assert within == [False], (
        "one validation is in the middle of the second step, one at the end of the epoch"
    )


def test_logs_are_at_optimizer_steps_or_never(parts, conversations, tmp_path):
    """An epoch has six micro-batches and three steps."""
    assert fit(parts, conversations, tmp_path)[2].log_every_n_steps == 3
    callbacks = [Throughput(), LossMonitor()]
    assert (
        len(fit(parts, conversations, tmp_path, log_every_n_steps=0, callbacks=callbacks)[1]) == 6
    )


def test_records_that_show_their_answers_stop_the_run_before_a_model_is_built(parts, tmp_path):
    tiny_models.write_conversations(tmp_path)
    records = json.loads((tmp_path / "data.json").read_text())
    records[0]["conversations"] = tiny_models.turns("name", "sky") + tiny_models.turns(
        "<image>\nname", "wall"
    )
    (tmp_path / "data.json").write_text(json.dumps(records))
    built = module(parts, image_attention="prefix")
    with pytest.raises(ValueError, match="in 1 of 12 records an image follows an answer"):
        trainer(tmp_path).fit(built, datamodule=data(tmp_path, parts))
    assert built.model is None


def test_captions_have_no_questions_to_validate_with(parts, conversations):
    with pytest.raises(
        ValueError, match="data.val_annotations must be null with data.template plain"
    ):
        data(
            conversations, parts, template="plain", val_annotations=str(conversations / "data.json")
        )


def test_checkpoint_holds_trainable_weights_and_is_rejected_by_another_stage(
    parts, conversations, tmp_path
):
    _, _, run = fit(parts, conversations, tmp_path, module_kwargs={"trainable": ["adapter"]})
    run.save_checkpoint(tmp_path / "stage1.ckpt")
    kept = torch.load(tmp_path / "stage1.ckpt", weights_only=True)["state_dict"]
    assert len(kept) == 4 and all("multi_modal_projector" in name for name in kept)
    with pytest.raises(
        ValueError,
        match=r"run with model.trainable=\['adapter'\], but this run has \['adapter', 'llm'\]",
    ):
        fit(parts, conversations, tmp_path, ckpt_path=tmp_path / "stage1.ckpt")
    stage2 = module_with_model(parts)
    with pytest.raises(
        ValueError, match="belongs to another stage or model"
    ):  # outside training too
        stage2.on_load_checkpoint(torch.load(tmp_path / "stage1.ckpt", weights_only=True))


def test_with_lora_exactly_updates_and_adapter_train_and_are_saved(parts, conversations, tmp_path):
    built, _, run = fit(parts, conversations, tmp_path, module_kwargs=LORA)
    run.save_checkpoint(tmp_path / "lora.ckpt")
    pairs = zip(
        built.model.named_parameters(),
        module_with_model(parts, **LORA).model.parameters(),
        strict=True,
    )
    moved = {f"model.{name}" for (name, a), b in pairs if not torch.equal(a, b)}
    updates = {name for name in moved if ".lora_A." in name or ".lora_B." in name}
    assert len(updates) == 2 * 7 * 3, "A and B of seven linear layers in each of three blocks"
    assert len(moved - updates) == 4 and all(
        "multi_modal_projector" in name for name in moved - updates
    )
    assert set(torch.load(tmp_path / "lora.ckpt", weights_only=True)["state_dict"]) == moved


def test_frozen_weights_in_bfloat16_need_mixed_precision(parts, conversations, tmp_path):
    with pytest.raises(
        ValueError, match="frozen_dtype bfloat16 needs trainer.precision bf16-mixed, got 32-true"
    ):
        fit(parts, conversations, tmp_path, module_kwargs={"frozen_dtype": "bfloat16"})


def convert_after_loading(parts, **kwargs) -> LlavaTraining:
    """The reference: all weights are read in fp32, then frozen ones converted."""
    built = module_with_model(parts, **kwargs)
    for parameter in built.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return built


@pytest.mark.parametrize("published", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stage", [{"trainable": ["adapter"]}, {"trainable": ["llm"]}, LORA])
def test_frozen_weights_are_read_in_bfloat16_as_if_converted_after_loading(
    stage, published, parts, conversations, tmp_path
):
    """Weights, buffers and losses are equal bit for bit, the rows of added tokens and new low-rank updates included."""
    llm = tmp_path / "llm"
    shutil.copytree(parts[1], llm)
    LlamaForCausalLM.from_pretrained(parts[1], dtype=published).save_pretrained(llm)
    published_parts = (parts[0], str(llm))
    expected = convert_after_loading(published_parts, **stage)
    built = module_with_model(published_parts, **stage, frozen_dtype="bfloat16")
    tensors, others = (
        [*m.model.named_parameters(), *m.model.named_buffers()] for m in (built, expected)
    )
    for (name, tensor), (other, reference) in zip(tensors, others, strict=True):
        assert (
            name == other and tensor.dtype == reference.dtype and torch.equal(tensor, reference)
        ), name
        assert tensor.requires_grad == reference.requires_grad
    batch = next(iter(loader(conversations, parts)))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [m.loss(batch) for m in (built, expected)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    pairs = zip(built.model.parameters(), expected.model.parameters(), strict=True)
    gradients = [(a.grad, b.grad) for a, b in pairs if a.grad is not None]
    assert gradients and all(torch.equal(a, b) for a, b in gradients)


def test_lora_without_the_llm_is_an_error(parts):
    with pytest.raises(ValueError, match=r"model.trainable must include llm, got \['adapter'\]"):
        module(parts, trainable=["adapter"], **LORA)


def test_validation_answers_the_questions(parts, conversations, tmp_path):
    """The exact match is right for answers known in advance."""
    built, source = (
        module(parts),
        data(conversations, parts, val_annotations=str(conversations / "data.json")),
    )
    expected = [
        record["conversations"][1]["value"]
        for record in json.loads((conversations / "data.json").read_text())
    ]
    answers = iter([*expected[:5], *["no"] * 7])
    built.answer = lambda prompts: [next(answers) for _ in prompts["input_ids"]]
    metrics = trainer(tmp_path).validate(built, datamodule=source, verbose=False)[0]
    assert metrics["val/answer_accuracy"] == pytest.approx(5 / 12)


def test_validation_asks_the_first_question_and_rejects_records_without_an_answer(parts, tmp_path):
    """A first turn from gpt is dropped, as in training."""
    turns = [
        {"from": "gpt", "value": "hello"},
        {"from": "human", "value": "sky"},
        {"from": "gpt", "value": "wall"},
    ]

    def first_batch(*records):
        (tmp_path / "val.json").write_text(
            json.dumps([{"id": f"r{i}", "conversations": r} for i, r in enumerate(records)])
        )
        source = data(tmp_path, parts, val_annotations=str(tmp_path / "val.json"))
        source.trainer = SimpleNamespace(global_rank=0, world_size=1)
        source.setup("validate")
        return next(iter(source.val_dataloader()))

    batch, plain = first_batch(turns), first_batch(turns[1:])
    assert batch["answers"] == ["wall"] and torch.equal(batch["input_ids"], plain["input_ids"])
    assert torch.equal(batch["prompts"]["input_ids"], plain["prompts"]["input_ids"])
    for unanswered in (turns[1:2], turns[:2], [turns[1], {"from": "gpt", "value": ""}]):
        with pytest.raises(
            ValueError, match=r"val.json: 1 of 2 records have no answer .* record 1 \(id 'r1'\)"
        ):
            first_batch(turns, unanswered)


def test_validation_without_questions_is_an_error(parts, conversations, tmp_path):
    """Lightning would end with success and no metric."""
    with pytest.raises(
        ValueError, match="data.val_annotations is not set, so there are no questions"
    ):
        trainer(tmp_path).validate(module(parts), datamodule=data(conversations, parts))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_validation_gives_every_rank_as_many_samples_and_counts_each_once(
    ranks, parts, conversations
):
    """Under ZeRO-3 a rank with one more batch would deadlock; a sample counted twice would shift the metrics."""
    counts, answers, supervised = set(), [], 0
    for rank in range(ranks):
        source = data(
            conversations,
            parts,
            val_annotations=str(conversations / "data.json"),
            micro_batch_size=5,
        )
        source.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)
        source.setup("validate")
        batches = list(source.val_dataloader())
        counts.add(tuple(len(batch["ids"]) for batch in batches))
        answers += [answer for batch in batches for answer in batch["answers"]]
        supervised += sum(batch["supervised"] for batch in batches)
        assert all((batch["labels"][len(batch["answers"]) :] == -100).all() for batch in batches)
    assert len(counts) == 1
    records = json.loads((conversations / "data.json").read_text())
    assert sorted(answers) == sorted(record["conversations"][1]["value"] for record in records)
    together = data(conversations, parts).collate(
        [loader(conversations, parts).dataset[i] for i in range(12)]
    )
    assert supervised == together["supervised"]


def test_progress_shows_the_loss_of_a_micro_batch_under_accumulation(
    parts, conversations, tmp_path, caplog
):
    """Lightning's outputs hold the loss divided by the number of accumulated micro-batches."""
    caplog.set_level("INFO")
    _, losses, _ = fit(parts, conversations, tmp_path, callbacks=[LogProgress()])
    shown = [
        float(re.search(r"loss ([\d.]+)", text)[1])
        for text in caplog.messages
        if " batches/s" in text
    ]
    assert shown == [pytest.approx(losses[-1][1], rel=1e-3)], (
        "two micro-batches a step; one line per epoch"
    )


def test_gradients_can_be_clipped_in_mixed_precision(parts, conversations, tmp_path):
    """Lightning cannot clip gradients of a fused optimizer in mixed precision."""
    _, losses, run = fit(
        parts, conversations, tmp_path, gradient_clip_val=0.1, precision="bf16-mixed"
    )
    assert len(losses) == 6 and not run.optimizers[0].param_groups[0]["fused"]
