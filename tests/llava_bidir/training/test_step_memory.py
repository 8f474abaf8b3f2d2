"""The memory, steps and tokens that are estimated of a training against those of the training itself."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny_models
import torch
from live_memory import PeakAfterFirstStep
from PIL import Image
from processes import run_ranks
from training_runs import make_data, make_trainer
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_bidir.model.encoders import Encoder
from llava_bidir.model.lora import Lora
from llava_bidir.training.estimate import estimate
from llava_bidir.training.module import LlavaTraining
from llava_bidir.training.step_memory import Sharding, Spread

IMAGE_TOKENS = 36
BOTH = ("adapter", "llm")
BF16 = "bf16-mixed"
SAVED = {"gradient_checkpointing": True}
# without these, all of a small model would be gathered, and its gradients would be less than a bucket
SMALL = {"reduce_bucket_size": 20_000, "overlap_comm": False, "stage3_max_live_parameters": 0}
SMALL |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
LORA = {"lora": Lora(r=8, alpha=16, dropout=0.1)}
FROZEN = {"frozen_dtype": "bfloat16"}


@dataclass
class Case:
    """A training on one process, or on two of a strategy."""

    sharding: Sharding = Sharding.NONE
    precision: str = "32-true"
    settings: dict = field(default_factory=dict)
    trainable: tuple = BOTH
    batch_size: int = 4
    zero: dict = field(default_factory=dict)

    @property
    def spread(self) -> Spread:
        devices = 1 if self.sharding is Sharding.NONE else 2
        return Spread(devices, self.sharding, self.precision, self.zero)


AT_EVERY_CHANGE = ("float32", "recomputed", "lora, frozen in bfloat16")  # the others are nightly
ALONE = {
    "float32": Case(),
    "float32, one micro-batch a step": Case(batch_size=2),
    "recomputed": Case(settings=SAVED),
    "autocast": Case(precision=BF16),
    "bidirectional": Case(precision=BF16, settings=SAVED | {"image_attention": "bidirectional"}),
    "stage 1": Case(precision=BF16, trainable=("adapter",), settings=FROZEN),
    "lora": Case(settings=LORA | SAVED),
    "lora, frozen in bfloat16": Case(precision=BF16, settings=LORA | FROZEN),
}
ZERO2 = {"stage": 2, **SMALL}
ZERO3 = {"stage": 3, **SMALL}
TOGETHER = {
    "ddp": Case(Sharding.DDP),
    "zero2": Case(Sharding.ZERO2, BF16, zero=ZERO2),
    "zero2, accumulated": Case(Sharding.ZERO2, BF16, zero=ZERO2, batch_size=8),
    "zero2, stage 1": Case(Sharding.ZERO2, BF16, trainable=("adapter",), zero=ZERO2),
    "zero3": Case(Sharding.ZERO3, BF16, zero=ZERO3),
    "zero3, recomputed": Case(Sharding.ZERO3, BF16, SAVED, zero=ZERO3, batch_size=8),
    "zero3, all gathered": Case(
        Sharding.ZERO3, BF16, zero={"stage": 3, "reduce_bucket_size": 20_000}
    ),
    "fsdp2": Case(Sharding.FSDP2, BF16, batch_size=8),
    "fsdp2, recomputed": Case(Sharding.FSDP2, BF16, SAVED),
    "fsdp2, float32": Case(Sharding.FSDP2, settings=SAVED),
    "fsdp2, lora": Case(Sharding.FSDP2, BF16, LORA | FROZEN),
}

AT_EVERY_LANDING = ("ddp", "zero2", "zero3, recomputed", "fsdp2")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model with few tensors that are small, and records of one length, so that micro-batches need the same."""
    root = tmp_path_factory.mktemp("memory")
    encoder, llm = tiny_models.write_parts(root)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=48,
            patch_size=8,
        )
    ).save_pretrained(encoder.path)
    ends = {
        key: json.loads(Path(llm, "config.json").read_text())[key]
        for key in ("bos_token_id", "eos_token_id")
    }
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=1024,
            **ends,
        )
    ).save_pretrained(llm)
    Image.new("RGB", (50, 60), "red").save(root / "a.png")
    turns = tiny_models.turns("<image>\nname the sky", "wall " * 40)
    records = [{"id": f"{i}", "image": "a.png", "conversations": turns} for i in range(16)]
    (root / "data.json").write_text(json.dumps(records))
    return root, (Encoder("clip", encoder.path, layer=-1), llm)


def build(world, case: Case) -> tuple:
    root, parts = world
    torch.manual_seed(0)
    module = LlavaTraining(*parts, list(case.trainable), **case.settings)
    data = make_data(root, parts, batch_size=case.batch_size, image_tokens=IMAGE_TOKENS)
    return module, data


def strategy_of(case: Case):
    if case.spread.is_zero:
        from zero_on_cpu import ZeROOnCPU

        return ZeROOnCPU(case.zero)
    if case.sharding is Sharding.FSDP2:
        from llava_bidir.training.fsdp2_strategy import FSDP2

        return FSDP2()
    return "ddp" if case.sharding is Sharding.DDP else "auto"


def train(world, case: Case, out: Path) -> None:
    """Train, and write what the process held at most, its steps and its tokens."""
    peak = PeakAfterFirstStep()
    module, data = build(world, case)
    trainer = make_trainer(
        out,
        devices=case.spread.devices,
        strategy=strategy_of(case),
        precision=case.precision,
        max_epochs=1,
        callbacks=[peak],
    )
    trainer.fit(module, datamodule=data)
    measured = {"peak": peak.meter.peak, "steps": trainer.global_step, "tokens": peak.tokens}
    (out / f"{trainer.global_rank}.json").write_text(json.dumps(measured))


def estimated(world, case: Case):
    module, data = build(world, case)
    trainer = make_trainer(".", max_epochs=1)
    return estimate(module, data=data, trainer=trainer, spread=case.spread, tflops=1.0)


def check(world, case: Case, out: Path) -> None:
    measured = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    costs = estimated(world, case)
    assert len(measured) == case.spread.devices
    assert costs.steps == measured[0]["steps"]
    assert costs.tokens == sum(rank["tokens"] for rank in measured)
    assert costs.memory.total == pytest.approx(max(rank["peak"] for rank in measured), rel=0.1)


@pytest.mark.parametrize(
    "name",
    [
        name if name in AT_EVERY_CHANGE else pytest.param(name, marks=pytest.mark.nightly)
        for name in ALONE
    ],
)
def test_memory_is_that_of_a_training_on_one_device(name, world, tmp_path):
    train(world, ALONE[name], tmp_path)
    check(world, ALONE[name], tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in AT_EVERY_LANDING else pytest.mark.nightly)
        for name in TOGETHER
    ],
)
def test_memory_is_that_of_a_training_on_two_devices(name, world, tmp_path):
    case = TOGETHER[name]
    if case.spread.is_zero:
        pytest.importorskip("deepspeed", reason="DeepSpeed (extra: cluster) is not installed")
    codes, log = run_ranks(lambda: train(world, case, tmp_path), tmp_path)
    assert codes == [0, 0], log
    check(world, case, tmp_path)
