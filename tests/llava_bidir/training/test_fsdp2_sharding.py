"""Which modules FSDP2 shards, and the dtypes in which it gathers their weights, in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llava_bidir.training.fsdp2_strategy import find_layers, shard
from llava_bidir.training.module import LlavaTraining


@pytest.fixture
def mesh():
    """One process of a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Weighted(LlavaTraining):
    """Returns the weight of a batch, and keeps the dtype in which the head has its own."""

    def training_step(self, batch: dict, batch_idx: int):
        self.gathered = self.model.lm_head.weight.dtype
        return batch["weight"]


@pytest.mark.parametrize(
    ("precision", "gathered", "trainable"),
    [("32-true", torch.float32, ["adapter"]), ("bf16-mixed", torch.bfloat16, ["adapter", "llm"])],
)
def test_each_layer_is_a_unit_that_is_gathered_in_the_precision_of_the_run(
    precision, gathered, trainable, parts, mesh
):
    """Masters stay in fp32, and the weight of a loss is not rounded."""
    module = Weighted(*parts, trainable)
    module.configure_model()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    shard(module, mesh, precision)
    units = {name for name, part in module.named_modules() if isinstance(part, FSDPModule)}
    layers = {f"model.model.language_model.layers.{i}" for i in range(3)}
    layers |= {f"model.model.vision_tower.encoder.layers.{i}" for i in range(2)}
    assert units == {"", *layers}
    weight = torch.tensor(1.2345678)
    assert torch.equal(module.training_step({"weight": weight}, 0), weight)
    assert module.gathered == gathered
    parameters = dict(module.named_parameters())
    state = module.state_dict()
    assert all(isinstance(state[name], DTensor) for name in parameters)
    assert {state[name].dtype for name in parameters} == {torch.float32}
    assert {name for name, p in parameters.items() if p.requires_grad} == trained


def test_modules_in_a_list_inside_a_layer_belong_to_its_unit():
    layers = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])}) for _ in "ab"
    )
    assert find_layers(nn.ModuleDict({"llm": nn.ModuleDict({"layers": layers})})) == [*layers]
