"""Run LLaVA's own train() and record it; for the environment with the authors' package.

    .venv-llava/bin/python tests/peers/llava/theirs.py OUT PRECISION [train()'s own flags]

Patches, all of them here:

- the vision tower in the precision of the run: `train()` converts it to float16 if not to bfloat16, and this torch has
  no convolution in float16 on a CPU;
- float64: weights and pixels are double, and so is what the model computes in float32 (`record.FloatIsDouble`);
- sampler, dataset, forward and optimizer are wrapped to see what passes; what passes stays as it is.
"""

import sys
from pathlib import Path

import llava.train.train as program
import torch
import transformers
from record import FloatIsDouble, Recorder

IMAGE = -200
RENAMED = (  # Hugging Face's names
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.layers.", "model.language_model.layers."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.norm.", "model.language_model.norm."),
)
OUT = Path(sys.argv[1])
PRECISION = sys.argv[2]
DTYPE = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}[PRECISION]
recorder = Recorder(OUT)


def new_name(name: str) -> str:
    """Return our name of a parameter of theirs."""
    for old, new in RENAMED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


class RecordedSampler:
    """A sampler that keeps its order, and the state of the random numbers it was drawn with."""

    def __init__(self, sampler):
        self.sampler = sampler
        self.order: list[int] = []

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        self.state = torch.get_rng_state().tolist()
        for index in self.sampler:
            self.order.append(int(index))
            yield index


class RecordedTrainer(program.LLaVATrainer):
    """LLaVA's trainer, watched."""

    def __init__(self, model, **kwargs):
        model.get_vision_tower().to(DTYPE)
        if PRECISION == "float64":
            model.double()
        forward = model.get_model().forward

        def recorded_forward(**inputs):
            self.fed = inputs
            return forward(**inputs)

        model.get_model().forward = recorded_forward
        super().__init__(model=model, **kwargs)

    def _get_train_sampler(self):
        self.order = RecordedSampler(super()._get_train_sampler())
        return self.order

    def create_optimizer(self):
        optimizer = super().create_optimizer()
        names = {id(p): new_name(name) for name, p in self.model.named_parameters()}
        recorder.add_groups(optimizer, names)
        optimizer.register_step_pre_hook(lambda optimizer, *_: recorder.add_step(optimizer))
        return optimizer

    def compute_loss(self, model, inputs):
        images = inputs["images"]
        if PRECISION == "float64":
            inputs["images"] = images.double()
        labels = []
        prepare = model.prepare_inputs_labels_for_multimodal

        def recorded(*args, **kwargs):
            prepared = prepare(*args, **kwargs)
            labels.append(prepared[-1])
            return prepared

        model.prepare_inputs_labels_for_multimodal = recorded
        loss = super().compute_loss(model, inputs)
        del model.prepare_inputs_labels_for_multimodal
        recorder.add_batch(
            input_ids=self.expanded(inputs),
            labels=labels[0],
            attention_mask=self.fed["attention_mask"],
            pixels=images.double().flatten(1),
        )
        recorder.add_loss(loss)
        return loss

    def expanded(self, inputs) -> torch.Tensor:
        """Return the ids with each image as often as the model was fed it, 0 for padding."""
        tokens = self.model.get_vision_tower().num_patches
        mask = self.fed["attention_mask"]
        expanded = torch.zeros(mask.shape, dtype=torch.long)
        rows = zip(expanded, inputs["input_ids"], inputs["attention_mask"], strict=True)
        for row, ids, kept in rows:
            ids = ids[kept]
            repeats = torch.where(ids == IMAGE, tokens, 1)
            ids = ids.repeat_interleave(repeats)[: mask.shape[1]]
            row[: len(ids)] = ids
        return expanded

    def train(self, *args, **kwargs):
        if PRECISION == "float64":
            torch.set_default_dtype(torch.float64)
            with FloatIsDouble():
                for layer in self.model.get_model().layers:
                    layer.self_attn._init_rope()  # was rounded to float32
                result = super().train(*args, **kwargs)
        else:
            result = super().train(*args, **kwargs)
        weights = {new_name(name): p for name, p in self.model.named_parameters()}
        recorder.write(
            weights,
            transformers=transformers.__version__,
            order=self.order.order,
            generator_state=self.order.state,
            trainable=sorted(
                new_name(n) for n, p in self.model.named_parameters() if p.requires_grad
            ),
        )
        return result


if __name__ == "__main__":
    program.LLaVATrainer = RecordedTrainer
    sys.argv = [sys.argv[0], *sys.argv[3:]]
    program.train()
