"""Run `llava-bidir fit` on the batches of a recorded training of LLaVA, and record it in the same way.

    .venv/bin/python tests/peers/llava/ours.py OUT THEIRS [--own-order] [--stop-after STEPS] [fit's flags]

With `--own-order`, its own sampler draws the batches, from the random numbers that LLaVA's had. `--stop-after` leaves
the schedule as it is.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import transformers
from lightning import Callback
from record import FloatIsDouble, Recorder

from llava_bidir import cli
from llava_bidir.training import cli as training_cli

IMAGE = -200  # LLaVA's id


class Watch(Callback):
    """Train the given batches and keep what passes."""

    def __init__(self, recorder: Recorder, theirs: dict, arguments: argparse.Namespace):
        self.recorder = recorder
        self.theirs = theirs
        self.own_order = arguments.own_order
        self.last_step = arguments.stop_after

    def on_fit_start(self, trainer, pl_module) -> None:
        """Replace the order of the sampler, or its random numbers."""
        sampler = trainer.datamodule.sampler
        draw = sampler.draw

        def drawn(lengths, batch_size, micro_batch_size, generator):
            if self.own_order:
                generator.set_state(torch.tensor(self.theirs["generator_state"], dtype=torch.uint8))
                batches = draw(lengths, batch_size, micro_batch_size, generator)
            else:
                batches = np.array(self.theirs["order"]).reshape(-1, batch_size)
            self.drawn = batches.ravel().tolist()
            return batches

        sampler.draw = drawn

    def on_train_start(self, trainer, pl_module) -> None:
        """Keep the parameter groups."""
        names = {id(p): name for name, p in pl_module.model.named_parameters()}
        self.recorder.add_groups(trainer.optimizers[0], names)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Keep the batch with LLaVA's id for image tokens, and black pixels for text."""
        ids = batch["input_ids"]
        is_image = ids == pl_module.model.config.image_token_id
        has_image = is_image.any(1)
        pixels = torch.zeros(len(ids), batch["pixel_values"][0].numel(), dtype=torch.float64)
        if has_image.any():
            pixels[has_image] = batch["pixel_values"].double().flatten(1)
        attended = batch["attention_mask"].bool()
        self.recorder.add_batch(
            input_ids=ids.masked_fill(is_image, IMAGE).masked_fill(~attended, 0),
            labels=batch["labels"],
            attention_mask=attended,
            pixels=pixels,
        )

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        """Keep the loss, which Lightning has divided."""
        self.recorder.add_loss(loss * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        """Keep the step."""
        self.recorder.add_step(optimizer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Stop early if asked."""
        trainer.should_stop = trainer.global_step == self.last_step

    def on_train_end(self, trainer, pl_module) -> None:
        """Write all of it."""
        model = pl_module.model
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        self.recorder.write(
            dict(model.named_parameters()),
            transformers=transformers.__version__,
            order=self.drawn,
            trainable=sorted(trainable),
        )


def main(argv: list[str]) -> None:
    """Train and write the record."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("--own-order", action="store_true")
    parser.add_argument("--stop-after", type=int)
    arguments, flags = parser.parse_known_args(argv)
    out = arguments.out
    record = json.loads((arguments.theirs / "record.json").read_text())
    is_double = "64-true" in flags

    class WatchedCLI(training_cli.TrainingCLI):
        """The program's own, with one more callback."""

        def instantiate_trainer(self, **kwargs):
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(Watch(Recorder(out), record, arguments))
            return trainer

        def fit(self, *args, **kwargs):
            with FloatIsDouble() if is_double else nullcontext():
                super().fit(*args, **kwargs)

    training_cli.TrainingCLI = WatchedCLI
    sys.exit(cli.main(["fit", "--out", str(out / "run"), "--overwrite", "true", *flags]))


if __name__ == "__main__":
    main(sys.argv[1:])
