"""Training runs on several processes, started by training_runs.py: python ddp_script.py SPEC RUN ...

A RUN is STRATEGY:FUNCTION:PRECISION, with a function of this file. One set of processes executes many runs. The
result of each rank is saved as OUT/RUN.RANK.pt for the tests.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import yaml
from lightning import Callback
from lightning.pytorch.loops import utilities as lightning_loops
from lightning.pytorch.strategies import DDPStrategy
from processes import die
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from training_runs import make_data, make_trainer
from zero_on_cpu import ZeROOnCPU, gather_parameters

from llava_bidir.common.checkpoints import AtomicCheckpointIO, Checkpoints
from llava_bidir.model.encoders import Encoder
from llava_bidir.training.fsdp2_strategy import FSDP2
from llava_bidir.training.module import LlavaTraining
from llava_bidir.training.read_checkpoint import export_checkpoint

SPEC = json.loads(Path(sys.argv[1]).read_text())
OUT = Path(SPEC["out"])
MIDDLE = 2  # optimizer step with a checkpoint, inside the first epoch of three steps
END = 6  # after the second epoch
FAULTY = {MIDDLE: "fault/good.ckpt", END: "fault/bad.ckpt"}
# 0 lets ZeRO-3 partition and release parameters of a model this small
THRESHOLDS = (
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)


def build_strategy(name: str, grad_accum_dtype: str | None):
    if name == "ddp":
        return DDPStrategy()
    if name == "fsdp2":
        return FSDP2()
    file = f"configs/cluster/{name}.yaml"
    config = yaml.safe_load((Path(__file__).parents[2] / file).read_text())
    zero = config["trainer"]["strategy"]["init_args"]["zero_optimization"]
    zero |= {"reduce_bucket_size": 2000, "overlap_comm": False}  # several buckets
    if zero["stage"] == 3:
        zero |= dict.fromkeys(THRESHOLDS, 0)
    return ZeROOnCPU(zero, grad_accum_dtype=grad_accum_dtype)


class Recorder(Callback):
    """Records losses and text-only batches, and saves checkpoints at given steps."""

    def __init__(self, save: dict[int, str]):
        self.save = save
        self.losses = []
        self.text_only = []

    def on_train_batch_end(self, trainer, module, outputs, batch, *args):
        loss = outputs["loss"].item() * trainer.accumulate_grad_batches  # Lightning divides it
        self.losses.append((tuple(batch["ids"]), loss))
        self.text_only.append(len(batch["image_positions"]) == 0)
        if not trainer.fit_loop._should_accumulate() and trainer.global_step in self.save:
            trainer.save_checkpoint(OUT / self.save[trainer.global_step])


def prepare(
    strategy: str,
    precision: str,
    llm: str = "llm",
    callbacks=(),
    epochs: int = 2,
    batch_size: int = 4,
    grad_accum_dtype: str | None = None,
    clip: float | None = None,
    validate_first: bool = False,
    trainable=("adapter", "llm"),
    layer: int = -1,
    folder: str = "",
    **settings,
):
    torch.manual_seed(0)
    parts = (Encoder("clip", SPEC["encoder"], layer=layer), SPEC[llm])
    settings |= {"learning_rate": 1e-2, "adapter_learning_rate": 5e-3, "max_new_tokens": 3}
    module = LlavaTraining(*parts, list(trainable), **settings)
    data = make_data(
        SPEC["conversations"],
        parts,
        val_annotations=f"{SPEC['conversations']}/questions.json",
        batch_size=batch_size,
        micro_batch_size=1,
    )
    trainer = make_trainer(
        OUT / f"{folder}{strategy}-{precision}",
        devices=SPEC["processes"],
        strategy=build_strategy(strategy, grad_accum_dtype),
        precision=precision,
        gradient_clip_val=clip,
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=int(validate_first),
        enable_checkpointing=any(isinstance(callback, Checkpoints) for callback in callbacks),
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
    )
    return trainer, module, data


def fit(
    strategy: str, precision: str, resume: str | None = None, save=None, callbacks=(), **kwargs
) -> dict:
    recorder = Recorder(save or {})
    trainer, module, data = prepare(strategy, precision, callbacks=[recorder, *callbacks], **kwargs)
    trainer.fit(module, datamodule=data, ckpt_path=OUT / resume if resume else None)
    run = Path(trainer.default_root_dir)
    if trainer.checkpoint_callbacks and trainer.is_global_zero:
        export_checkpoint(run / "checkpoints/last.ckpt", run / "hf")
    with gather_parameters(module.model):
        weights = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()
            for name, tensor in module.model.state_dict().items()
        }
    shares = {
        name: (p.numel(), p.ds_numel, p.ds_tensor.numel())
        for name, p in module.model.named_parameters()
        if hasattr(p, "ds_id")
    }
    shards = {
        name: tuple(p.to_local().shape)
        for name, p in module.model.named_parameters()
        if isinstance(p, DTensor)
    }
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    results = {
        "losses": recorder.losses,
        "text_only": recorder.text_only,
        "weights": weights,
        "graphs": counters["stats"]["unique_graphs"],
    }
    return results | {"metrics": metrics, "shares": shares, "shards": shards}


def uninterrupted(strategy, precision):
    save = {MIDDLE: f"{strategy}-middle-{precision}.ckpt", END: f"{strategy}-end-{precision}.ckpt"}
    return fit(strategy, precision, llm="dropout_llm", save=save, callbacks=[Checkpoints()])


def resume(strategy, precision):
    return fit(strategy, precision, llm="dropout_llm", resume=f"{strategy}-middle-{precision}.ckpt")


def encoder_uninterrupted(strategy, precision):
    return fit(strategy, precision, callbacks=[Checkpoints()], **TRAINED_ENCODER)


def encoder_killed(strategy, precision):
    """As `encoder_uninterrupted`; rank 1 is killed in the last step."""
    save = {MIDDLE: f"{strategy}-encoder-{precision}.ckpt"}
    return fit(strategy, precision, save=save, callbacks=[Die()], **TRAINED_ENCODER)


def encoder_resume(strategy, precision):
    return fit(strategy, precision, resume=SPEC["resume"][strategy], **TRAINED_ENCODER)


def validate(strategy, precision):
    """Validate in a trainer that never trained."""
    trainer, module, data = prepare(strategy, precision, llm="dropout_llm")
    checkpoint = OUT / f"{strategy}-end-{precision}.ckpt"
    trainer.validate(module, datamodule=data, ckpt_path=checkpoint)
    return {"metrics": {k: float(v) for k, v in trainer.callback_metrics.items()}}


def without_dropout(strategy, precision):
    """Comparable to one process, since dropout differs between ranks."""
    return fit(strategy, precision, epochs=1, save={MIDDLE: f"{strategy}-plain-{precision}.ckpt"})


# of two blocks, the first is read; its attention drops tokens, as that of the LLM
TRAINED_ENCODER = {
    "trainable": ["encoder", "adapter", "llm"],
    "layer": -2,
    "llm": "dropout_llm",
    "folder": "encoder-",
    "gradient_checkpointing": True,
}
SETTINGS = {  # other functions: what they train with
    "tokens": {"epochs": 1, "loss_average": "tokens"},  # which the ranks count together
    "twenty_steps": {"epochs": 7},  # 21 of two micro-batches a rank
    "clipped": {
        "clip": 1.0,
        "weight_decay": 0.1,
        "loss_average": "tokens",
        "gradient_checkpointing": True,
    },
    "stage1": {"trainable": ["adapter"]},
    "encoder": TRAINED_ENCODER | {"llm": "llm", "weight_decay": 0.1},
    "compiled": {"epochs": 1, "compile": True},
    "tied": {"llm": "tied_llm", "folder": "tied-", "callbacks": [Checkpoints()]},
    "lora": {
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "frozen_dtype": "bfloat16",
        "folder": "lora-",
        "callbacks": [Checkpoints()],
    },
    # for the norm of the gradient
    "many_micro_batches": {"epochs": 1, "batch_size": 256},
    "sum_in_fp32": {"epochs": 1, "batch_size": 256, "grad_accum_dtype": "fp32"},
}


def validate_as_on_gpus(strategy, precision):
    """As `validate`, in inference mode: without Lightning's exception for gloo."""
    with patch.object(lightning_loops, "_distributed_is_initialized", lambda: False):
        return validate(strategy, precision)


def short_answers(strategy, precision):
    """Validate before the first step, too; answers of rank 1 are shorter than those of rank 0."""
    return fit(strategy, precision, epochs=1, validate_first=True, callbacks=[EndAtOnce()])


class EndAtOnce(Callback):
    """Takes every token for the end of an answer on rank 1."""

    def on_validation_start(self, trainer, module):
        if trainer.global_rank == 1:
            vocabulary = len(module.processor.tokenizer)
            module.model.generation_config.eos_token_id = list(range(vocabulary))


def resume_elsewhere(strategy, precision):
    """Resume `without_dropout` from SPEC["resume"], a checkpoint of another strategy."""
    return fit(strategy, precision, epochs=1, resume=SPEC["resume"][strategy])


def faulty(strategy, precision, fault: Callback):
    """Train with a checkpoint at MIDDLE and one at END, before which rank 1 is killed."""
    return fit(
        strategy, precision, llm="dropout_llm", save=FAULTY, callbacks=[fault, Checkpoints()]
    )


def kill_in_save(strategy, precision):
    """Kill rank 1 while it writes its shard of the second checkpoint."""
    return faulty(strategy, precision, DieInSave())


def kill_in_step(strategy, precision):
    """Kill rank 1 inside an epoch, while rank 0 trains a micro-batch."""
    return faulty(strategy, precision, Die())


class Die(Callback):
    """Kills rank 1 in the last step."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == END - 1 and trainer.global_rank == 1:
            self.begin()

    def begin(self):
        die()


class DieInSave(Die):
    """Kills rank 1 when it has begun to write its shard of the checkpoint at END."""

    def begin(self):
        original = torch.save

        def save(state, file, *args, **kwargs):
            if "optim_states" in str(file):
                Path(file).write_bytes(b"the beginning of a file")
                die()
            original(state, file, *args, **kwargs)

        torch.save = save


def reject(strategy, precision):
    """Resume from SPEC["resume"], which does not fit this strategy."""
    try:
        resume_elsewhere(strategy, precision)
    except ValueError as error:
        return {"message": str(error)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in sys.argv[2:]:
        strategy, name, precision = run.split(":")
        try:
            if name in SETTINGS:
                result = fit(strategy, precision, **SETTINGS[name])
            else:
                result = globals()[name](strategy, precision)
        except Exception:
            result = {"error": traceback.format_exc()}
            traceback.print_exc()
        torch.save(result, OUT / f"{run}.{os.environ['RANK']}.pt")
        if "error" in result:
            os._exit(1)
