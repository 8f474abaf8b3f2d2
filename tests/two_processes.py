"""Training runs on several processes, started by test_zero.py: python two_processes.py SPEC RUN ...

Each RUN is a function below. Processes are slow to start (imports), so one set of them does several runs. What a rank
finds goes to OUT/RUN.RANK.pt; the tests look at that.
"""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from lightning import Callback, Trainer  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

from llava_bidir.build import build_processor  # noqa: E402
from llava_bidir.data.datamodule import InstructionData  # noqa: E402
from llava_bidir.encoders import Encoder  # noqa: E402
from llava_bidir.training.callbacks import ExportModel  # noqa: E402
from llava_bidir.training.checkpoints import WholeCheckpointIO  # noqa: E402
from llava_bidir.training.module import LlavaTraining  # noqa: E402
from llava_bidir.training.zero import ZeRO, gathered  # noqa: E402

SPEC = json.loads(Path(sys.argv[1]).read_text())
OUT = Path(SPEC["out"])
SAVED_AT = 2  # optimizer step of the checkpoint, in the middle of an epoch of three
# nothing of a model this small would be partitioned or released otherwise
PARTITIONED = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")


def strategy():
    if SPEC["strategy"] == "ddp":
        return DDPStrategy(timeout=timedelta(minutes=1))
    config = yaml.safe_load((Path(__file__).parents[1] / f"configs/cluster/{SPEC['strategy']}.yaml").read_text())
    zero = config["trainer"]["strategy"]["init_args"]["zero_optimization"]
    zero |= {"reduce_bucket_size": 2000, "overlap_comm": False}  # several buckets
    if zero["stage"] == 3:
        zero |= dict.fromkeys(PARTITIONED, 0)
    return ZeRO(zero, timeout_minutes=1)


class Recorder(Callback):
    """Losses, and a checkpoint at one step."""

    def __init__(self, save: str | None):
        self.save, self.losses, self.text_only = save, [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append((tuple(batch["ids"]), outputs["loss"].item()))
        self.text_only.append(batch["pixel_values"] is None)
        boundary = not trainer.fit_loop._should_accumulate()
        if self.save and boundary and trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(OUT / self.save)


def fit(precision: str, *, llm: str = "llm", save: str | None = None, resume: str | None = None, epochs: int = 2, **kwargs):
    torch.manual_seed(0)
    encoder, llm = Encoder("clip", SPEC["encoder"], layer=-1), SPEC[llm]
    module = LlavaTraining(encoder, llm, ["adapter", "llm"], learning_rate=1e-2, max_new_tokens=3)
    folder = Path(SPEC["conversations"])
    data = InstructionData(
        str(folder / "data.json"),
        str(folder),
        val_annotations=SPEC.get("val_annotations"),
        processor=build_processor(encoder, llm),
        image_tokens=tiny.TOKENS,
        batch_size=4,
        micro_batch_size=1,
        num_workers=0,
    )
    recorder = Recorder(save)
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    chosen = strategy()
    trainer = Trainer(
        accelerator="cpu",
        devices=SPEC["processes"],
        strategy=chosen,
        precision=precision,
        max_epochs=epochs,
        default_root_dir=OUT / "run",
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=[recorder, *kwargs.pop("callbacks", [])],
        plugins=[] if isinstance(chosen, ZeRO) else [WholeCheckpointIO()],
        **settings,
        **kwargs,
    )
    trainer.fit(module, datamodule=data, ckpt_path=OUT / resume if resume else None)
    return module, trainer, recorder


def weights(module) -> dict[str, torch.Tensor]:
    with gathered(module.model):
        return {name: tensor.detach().clone() for name, tensor in module.model.state_dict().items()}


def found(module, trainer, recorder) -> dict:
    return {
        "losses": recorder.losses,
        "text_only": recorder.text_only,
        "weights": weights(module),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
    }


def whole(precision):
    return found(*fit(precision, llm="dropout_llm", save=f"mid-{precision}.ckpt"))


def resumed(precision):
    return found(*fit(precision, llm="dropout_llm", resume=f"mid-{precision}.ckpt"))


def plain(precision):
    """No dropout, which differs between ranks: comparable to one process."""
    return found(*fit(precision, epochs=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in sys.argv[2:]:
        name, _, argument = run.partition(":")
        try:
            result = globals()[name](*([argument] if argument else []))
        except Exception:
            result = {"error": traceback.format_exc()}
            traceback.print_exc()
        torch.save(result, OUT / f"{run}.{os.environ['RANK']}.pt")
        if "error" in result:
            os._exit(1)
