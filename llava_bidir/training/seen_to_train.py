"""A training is seen to train: each part that trains has a gradient and its weights move, and no others move.

Nothing else notices a part that is outside of the graph, or not in the optimizer: the loss falls with what the others
learn. Looked at are the first step with an answer about an image, and the first of these with a learning rate above 0.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llava_bidir.common.errors import UserError
from llava_bidir.common.processes import rank_zero_info
from llava_bidir.model.lora import UPDATES
from llava_bidir.model.trainable import part_of

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class SeenToTrain(Callback):
    """Ends a training of which a part has no gradient or does not move, or a frozen weight moves."""

    def __init__(self):
        self.is_seen = False
        self.has_image = False  # an answer of the step, on this process
        self.before: Tensor | None = None  # the step: sums of bits, i64[weights]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], *args: Any
    ) -> None:
        """Note whether an answer is about an image; others give the encoder and the adapter zero gradients."""
        self.has_image |= len(batch["image_positions"]) > 0 and batch["supervised"] > 0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Look at the gradients of a step, and note the weights before it.

        Raises:
            UserError: A part that trains has no gradient.
        """
        if self.is_seen or trainer.fit_loop._should_accumulate():
            return
        has_image = trainer.strategy.reduce_boolean_decision(self.has_image, all=False)
        self.has_image = False
        if not has_image:
            return
        weights = dict(pl_module.model.named_parameters())
        norms = {name: gradient_norm(p) for name, p in weights.items() if p.requires_grad}
        values = torch.stack([norm.to(pl_module.device) for norm in norms.values()]).tolist()
        self.norms = dict(zip(norms, values, strict=True))
        if not torch.tensor(values).isfinite().all():
            return  # 16-mixed leaves the step out, and other losses end the run
        self.gradients = shares_by_part({name: norm > 0 for name, norm in self.norms.items()})
        for part, share in self.gradients.items():
            check_share(part, share, "has a gradient")
        if any(group["lr"] for group in optimizer.param_groups):
            self.before = self._bits(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Compare the weights after the step with those before it, and log what has trained.

        Raises:
            UserError: A part has not moved, or a frozen weight has.
        """
        if self.before is None or trainer.fit_loop._should_accumulate():
            return
        differ = (self._bits(pl_module) != self.before).float()
        moved = trainer.strategy.reduce(differ, reduce_op="sum").bool().tolist()
        self.before = None
        self.is_seen = True
        of_weights = dict(zip(dict(pl_module.model.named_parameters()), moved, strict=True))
        frozen = [name for name in of_weights if of_weights[name] and name not in self.norms]
        if frozen:
            raise UserError(
                f"{len(frozen)} weights that do not train have changed, e.g. {min(frozen)}"
            )
        self._report(trainer, pl_module, {name: of_weights[name] for name in self.norms})

    def _report(
        self, trainer: Trainer, pl_module: LightningModule, moved: Mapping[str, bool]
    ) -> None:
        rates = pl_module.learning_rates()
        values = {}
        for part, share in shares_by_part(moved).items():
            if rates[part]:
                check_share(part, share, "has moved")
            of_part = [norm for name, norm in self.norms.items() if part_of(name) == part]
            norm = float(torch.tensor(of_part).norm())
            rank_zero_info(
                f"{part} trains: {self.gradients[part]:.0%} of its tensors have a gradient, of norm {norm:.3g} in all, "
                f"and {share:.0%} have moved"
            )
            values |= {f"trains/{part}_moved": share, f"trains/{part}_gradient": norm}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)

    def _bits(self, pl_module: LightningModule) -> Tensor:
        """Return a number for each weight that changes with any of its elements on this process, i64[weights]."""
        sums = [sum_of_bits(stored(p)) for p in pl_module.model.parameters()]
        return torch.stack([each.to(pl_module.device) for each in sums])


def check_share(part: str, share: float, verb: str) -> None:
    """Raise a UserError if no weight of a part trains."""
    if share == 0:
        raise UserError(
            f"model.trainable has {part}, but none of its weights {verb} in the first step: it does not train"
        )


def shares_by_part(flags: Mapping[str, bool]) -> dict[str, float]:
    """Return the share of weights with a flag, by part; the two factors of a low-rank update count as one."""
    units: dict[str, bool] = {}
    for name, flag in flags.items():
        unit = name.partition(UPDATES)[0]
        units[unit] = units.get(unit, False) or flag
    by_part: dict[str, list[bool]] = {}
    for unit, flag in units.items():
        by_part.setdefault(part_of(unit), []).append(flag)
    return {part: sum(of_part) / len(of_part) for part, of_part in by_part.items()}


def gradient_norm(parameter: nn.Parameter) -> Tensor:
    """Return the norm of a weight's gradient, of all processes together; 0 without one."""
    gradient = parameter.grad
    if is_of_zero(parameter):
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(parameter)
    if gradient is None:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(gradient.float())
    if isinstance(norm, DTensor):
        return norm.full_tensor()
    return norm


def stored(parameter: nn.Parameter) -> Tensor:
    """Return what an optimizer changes of a weight: its shard on this process, under ZeRO the fp32 master."""
    if parameter.requires_grad and is_of_zero(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


def is_of_zero(parameter: nn.Parameter) -> bool:
    """Return whether DeepSpeed's optimizer has a weight."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def sum_of_bits(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's elements read as integers, i64[]."""
    integers = tensor.detach().contiguous().view(INTEGERS[tensor.itemsize])
    return integers.sum(dtype=torch.int64)
