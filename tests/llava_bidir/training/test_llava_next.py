"""A trained tower beside LLaVA-NeXT's own code: parameter groups, rates, decay, and the losses of 50 steps in float64.

Set LLAVA_NEXT to a clone of LLaVA-VL/LLaVA-NeXT, of which helpers/llava_next.py says what is executed.
"""

import math
import os
import re
from dataclasses import replace

import pytest
import tiny_models
import torch
from lightning import Callback
from llava_next import IMAGE, Clone, LlavaNext, our_name
from peers.llava.record import FloatIsDouble
from training_runs import make_data, make_trainer
from transformers import CLIPVisionModel, TrainingArguments, get_scheduler

from llava_bidir.model.encoders import Encoder
from llava_bidir.training.module import LlavaTraining

pytestmark = [pytest.mark.nightly, pytest.mark.numerics]
FOLDER = os.environ.get("LLAVA_NEXT")
STEPS = 50
RATE = 1e-2
ADAPTER_RATE = 5e-3
WARMUP = 0.03
BATCH = 4
DIFFER = 2e-14  # nats, at most
# which decay there, and not here
NO_PRODUCTS = {
    f"model.vision_tower.embeddings.{name}"
    for name in ("class_embedding", "position_embedding.weight")
}


@pytest.fixture
def clone() -> Clone:
    if FOLDER is None:
        pytest.skip("needs LLaVA-NeXT: LLAVA_NEXT=FOLDER of a clone of LLaVA-VL/LLaVA-NeXT")
    return Clone(FOLDER)


class Watch(Callback):
    """Keeps batches, losses, groups and the rates of each step."""

    def __init__(self):
        self.batches, self.losses, self.rates = [], [], []

    def on_train_start(self, trainer, module):
        self.groups = groups_of(trainer.optimizers[0], module.model, lambda name: name)

    def on_train_batch_start(self, trainer, module, batch, *args):
        self.batches.append({k: v.clone() for k, v in batch.items() if torch.is_tensor(v)})

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(sorted({group["lr"] for group in optimizer.param_groups}))

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.losses.append(outputs["loss"].item())


def groups_of(optimizer, model, rename) -> dict[str, tuple[float, float]]:
    """Return peak rate and weight decay of each weight in an optimizer."""
    names = {id(p): rename(name) for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group.get("initial_lr", group["lr"]), group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.fixture
def parts(tmp_path) -> tuple[Encoder, str]:
    """A CLIP of four blocks, of which three are read, and a Llama."""
    encoder, llm = tiny_models.write_parts(tmp_path)
    config = tiny_models.vision_config()
    config.num_hidden_layers = 4
    CLIPVisionModel(config).save_pretrained(encoder.path)
    return replace(encoder, layer=-2), llm


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_trained_tower_is_that_of_llava_next(weight_decay, clone, parts, tmp_path):
    """Without decay, as in its scripts: all groups. With it, they also decay the tower's CLS and positions."""
    torch.manual_seed(0)
    settings = {"learning_rate": RATE, "weight_decay": weight_decay}
    rates = {"adapter_learning_rate": ADAPTER_RATE, "warmup_ratio": WARMUP}
    module = LlavaTraining(*parts, ["encoder", "adapter", "llm"], **settings | rates)
    module.configure_model()
    arguments = TrainingArguments(tmp_path / "theirs", **settings, use_cpu=True)
    arguments.mm_projector_lr = ADAPTER_RATE
    arguments.mm_vision_tower_lr = RATE * script_ratio(clone)
    theirs = LlavaNext(clone, module.model, parts[0].path, arguments)
    watch = Watch()
    trainer = make_trainer(tmp_path / "ours", precision="64-true", callbacks=[watch])
    folder = tiny_models.write_conversations(tmp_path / "data", BATCH * STEPS, text_only=30)
    with FloatIsDouble():
        trainer.fit(module, datamodule=make_data(folder, parts, micro_batch_size=BATCH))
    compare_groups(watch, theirs, weight_decay)
    losses = train(theirs, watch, module.model.config.image_token_id)
    trained = dict(module.model.named_parameters())
    weights = max(
        (p - trained[our_name(name)]).abs().max().item()
        for name, p in theirs.model.named_parameters()
    )
    largest = max(abs(x - y) for x, y in zip(losses, watch.losses, strict=True))
    print(
        f"decay {weight_decay}: {len(losses)} steps, losses {losses[0]:.3f} to {losses[-1]:.3f}, "
        f"differ by at most {largest:.2g}, weights by {weights:.2g}"
    )
    assert len(losses) == STEPS and losses[-1] < losses[0] - 1
    assert largest <= DIFFER
    assert weights <= 1e-11


def train(theirs: LlavaNext, watch: Watch, image_id: int) -> list[float]:
    """Train on the batches of ours, compare the rates of each step, and return the losses."""
    schedule = get_scheduler("cosine", theirs.optimizer, math.ceil(STEPS * WARMUP), STEPS)
    losses = []
    with FloatIsDouble():
        for batch, rates in zip(watch.batches, watch.rates, strict=True):
            loss = theirs.loss(*their_batch(batch, image_id))
            theirs.optimizer.zero_grad()
            loss.backward()
            assert sorted({group["lr"] for group in theirs.optimizer.param_groups}) == rates
            theirs.optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


def script_ratio(clone: Clone) -> float:
    """Return the tower's share of the learning rate in the script of LLaVA-OneVision."""
    script = clone.read("scripts/train/finetune_ov.sh")
    tower, rest = (
        float(re.search(rf"--{name}[= ](\S+)", script)[1])
        for name in ("mm_vision_tower_lr", "learning_rate")
    )
    assert tower / rest == pytest.approx(1 / 5)
    return 1 / 5


def compare_groups(watch: Watch, theirs: LlavaNext, weight_decay: float) -> None:
    """Compare rate and decay of every weight that has a gradient; then take the decay that is not here."""
    expected = groups_of(theirs.optimizer, theirs.model, our_name)
    without = {name for name in expected if name not in watch.groups}
    # what is behind the layer has no gradient there
    behind = ("model.vision_tower.encoder.layers.3.", "model.vision_tower.post_layernorm.")
    assert without and all(name.startswith(behind) for name in without)
    decayed = NO_PRODUCTS if weight_decay else set()
    differ = {name for name in watch.groups if watch.groups[name] != expected[name]}
    assert differ == decayed
    weights = {our_name(name): p for name, p in theirs.model.named_parameters()}
    for name in decayed:
        assert watch.groups[name] == (expected[name][0], 0.0)
        (group,) = (
            group
            for group in theirs.optimizer.param_groups
            if any(p is weights[name] for p in group["params"])
        )
        group["params"] = [p for p in group["params"] if p is not weights[name]]
        alone = {key: value for key, value in group.items() if key != "params"}
        theirs.optimizer.add_param_group(alone | {"params": [weights[name]], "weight_decay": 0.0})


def their_batch(batch: dict, image_id: int) -> tuple[torch.Tensor, ...]:
    """Return ids with one IMAGE an image, mask, labels, and a black image for a text."""
    rows = []
    images = torch.zeros(len(batch["input_ids"]), 3, 8, 8, dtype=torch.float64)
    pixels = iter(batch["pixel_values"])
    for i, (ids, mask, labels) in enumerate(
        zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True)
    ):
        ids, labels = ids[mask], labels[mask]
        is_image = ids == image_id
        if is_image.any():
            images[i] = next(pixels)
        first = is_image & (is_image.cumsum(0) == 1)
        kept = ~is_image | first
        rows.append((ids.masked_fill(first, IMAGE)[kept], labels[kept]))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row, _ in rows])
    labels = torch.stack(
        [torch.nn.functional.pad(row, (0, width - len(row)), value=-100) for _, row in rows]
    )
    mask = torch.tensor([[j < len(row) for j in range(width)] for row, _ in rows])
    return ids, mask, labels, images
