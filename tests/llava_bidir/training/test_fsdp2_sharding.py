"""Which modules FSDP2 shards, and that it computes on the CPU in one process what it is given."""

import pytest
import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llava_bidir.training.fsdp2_strategy import find_layers, mixed_precision, shard
from llava_bidir.training.module import LlavaTraining


@pytest.fixture
def mesh():
    """One process of a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("trainable", [["adapter"], ["adapter", "llm"]])
def test_each_layer_is_a_unit_and_the_rest_is_one(trainable, parts, mesh):
    encoder, llm = parts
    module = LlavaTraining(encoder, llm, trainable)
    module.configure_model()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    shard(module, mesh, mixed_precision("32-true"))
    units = {name for name, part in module.named_modules() if isinstance(part, FSDPModule)}
    layers = {f"model.model.language_model.layers.{i}" for i in range(3)}
    layers |= {f"model.model.vision_tower.encoder.layers.{i}" for i in range(2)}
    assert units == {"", *layers}
    parameters = dict(module.named_parameters())
    assert all(isinstance(p, DTensor) for p in parameters.values())
    assert {name for name, p in parameters.items() if p.requires_grad} == trained


def test_modules_in_a_list_inside_a_layer_belong_to_its_unit():
    layers = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])}) for _ in "ab"
    )
    assert find_layers(nn.ModuleDict({"llm": nn.ModuleDict({"layers": layers})})) == [*layers]


class Weighted(LightningModule):
    """Returns the weight of a batch, and the dtype in which its layer has its own."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.model.head = nn.Linear(4, 1)

    def training_step(self, batch: dict, batch_idx: int):
        self.gathered = self.model.head.weight.dtype
        return batch["weight"]

    validation_step = test_step = training_step

    def count_flops(self):
        return 0


@pytest.mark.parametrize(
    ("precision", "gathered", "kept"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
    ],
)
def test_weights_are_gathered_in_bf16_and_the_weight_of_a_loss_is_not_rounded(
    precision,
    gathered,
    kept,
    mesh,
):
    module = Weighted()
    shard(module, mesh, mixed_precision(precision))
    weight = torch.tensor(1.2345678)
    assert torch.equal(module.training_step({"weight": weight}, 0), weight)
    assert module.gathered == gathered
    assert {tensor.dtype for tensor in module.state_dict().values()} == {kept}
