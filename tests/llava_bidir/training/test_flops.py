"""The operations of a step against those that torch counts while it runs, and what becomes of them in the log."""

import pytest
import tiny_models
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from llava_bidir.data.collate import Collate
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.lora import Lora, add_lora
from llava_bidir.model.trainable import set_trainable
from llava_bidir.training.flops import count_flops
from llava_bidir.training.loss import supervised_loss


@pytest.mark.parametrize(
    ("trainable", "rank", "blocks"),
    [
        (["adapter"], None, None),
        (["adapter", "llm"], None, None),
        (["adapter", "llm"], 2, None),
        (["encoder", "adapter", "llm"], None, None),
        (["encoder", "adapter", "llm"], 2, 1),
    ],
)
def test_counted_operations_are_those_that_torch_counts(trainable, rank, blocks, parts):
    """Of two samples of one length, with an image each; of the encoder, all or the last block trains."""
    processor = build_processor(*parts)
    model = build_model(*parts, processor, attn_implementation="eager")
    if rank:
        add_lora(model, Lora(r=rank))
    model.model.vision_tower.set_attn_implementation("eager")  # torch counts no sdpa of the CPU
    set_trainable(model, trainable, blocks)
    turns = tiny_models.turns("<image>\nname", "wall")
    sample = {"id": "a", "image": Image.new("RGB", (8, 8)), "conversations": turns}
    batch = Collate(processor, tiny_models.TOKENS, "vicuna_v1")([sample, sample])
    flops = count_flops(model, batch["pixel_values"][:1])
    with FlopCounterMode(display=False) as counter:
        supervised_loss(model, batch).backward()
    operations = flops.of_batch(2, batch["lengths"], batch["supervised"])
    assert operations == counter.get_total_flops()
