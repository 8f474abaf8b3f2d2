"""Gradients of one optimizer step of eight samples, on several processes, for test_loss_average.py.

python ddp_gradients.py ENCODER LLM FOLDER LOSS_AVERAGE MICRO_BATCH DEVICES OUT
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import tiny_models  # noqa: E402
import torch  # noqa: E402
from lightning import Trainer  # noqa: E402

from llava_bidir.data.datamodule import InstructionData  # noqa: E402
from llava_bidir.model.build import build_processor  # noqa: E402
from llava_bidir.model.encoders import Encoder  # noqa: E402
from llava_bidir.training.module import LlavaTraining  # noqa: E402

GLOBAL_BATCH = 8


def fit_one_step(
    parts, folder: Path, loss_average: str, micro_batch_size: int, devices: int = 1, **data_settings
) -> dict:
    """Return {"gradients": by name, as passed to the optimizer; "batches", "model" and "rank" of this process}.

    Other arguments are those of InstructionData.
    """
    torch.manual_seed(0)
    module = LlavaTraining(*parts, ["adapter", "llm"], loss_average=loss_average, learning_rate=0.0)
    data = InstructionData(
        str(folder / "data.json"),
        str(folder),
        batch_size=GLOBAL_BATCH,
        micro_batch_size=micro_batch_size,
        num_workers=0,
        processor=build_processor(*parts),
        image_tokens=tiny_models.TOKENS,
        **data_settings,
    )
    results = {"batches": []}
    train, step = module.training_step, module.on_before_optimizer_step

    def recorded_train(batch, batch_idx):
        results["batches"].append(batch)
        return train(batch, batch_idx)

    def recorded_step(optimizer):
        results["gradients"] = {
            n: p.grad.clone() for n, p in module.model.named_parameters() if p.requires_grad
        }
        results["model"] = module.model
        step(optimizer)

    module.training_step, module.on_before_optimizer_step = recorded_train, recorded_step
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    return results | {"rank": trainer.global_rank}


if __name__ == "__main__":
    torch.set_num_threads(1)
    encoder, llm, folder, loss_average, micro_batch_size, devices, out = sys.argv[1:]
    parts = Encoder("clip", encoder, layer=-1), llm
    results = fit_one_step(parts, Path(folder), loss_average, int(micro_batch_size), int(devices))
    if results["rank"] == 0:
        torch.save(results["gradients"], out)
