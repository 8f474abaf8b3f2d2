"""What a training leaves for the comparison; runs in both environments, so it imports torch and numpy only."""

import json
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode


class FloatIsDouble(TorchFunctionMode):
    """Compute in float64 where a model asks for float32: norms, softmax, rotary positions, the loss.

    Both programs do so at different places; without it neither is a float64 computation.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Replace the dtype among a call's arguments."""
        if function is torch.Tensor.view:  # of the bytes of a file
            return function(*args, **(kwargs or {}))
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = [self.widen(value) for value in args]
        kwargs = {key: self.widen(value) for key, value in (kwargs or {}).items()}
        return function(*args, **kwargs)

    @staticmethod
    def widen(value):
        """Return float64 for float32, and anything else as it is."""
        return torch.float64 if value is torch.float32 else value


class Recorder:
    """Collect micro-batches, their losses, and the steps of the optimizer; write them into a folder.

    Args:
        folder: Where `record.json`, `batches.npz` and `weights.npz` are written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.batches: list[dict[str, np.ndarray]] = []
        self.losses: list[float] = []
        self.steps: list[dict] = []

    def add_batch(self, **tensors: torch.Tensor) -> None:
        """Keep what the model is fed: ids, labels, attention, and the sum of pixels per image."""
        self.batches.append({key: value.cpu().numpy().copy() for key, value in tensors.items()})

    def add_loss(self, loss: torch.Tensor) -> None:
        """Keep the loss of a micro-batch."""
        self.losses.append(loss.detach().double().item())

    def add_groups(self, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
        """Keep the parameter groups; names are those of parameters, by id()."""
        self.names = names
        self.groups = [
            {
                "weight_decay": group["weight_decay"],
                "eps": group["eps"],
                "betas": list(group["betas"]),
                "parameters": sorted(names[id(p)] for p in group["params"]),
            }
            for group in optimizer.param_groups
        ]

    def add_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the learning rates and the gradient norm, just before the weights change."""
        squares = 0.0
        rates = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                part = "adapter" if "projector" in self.names[id(parameter)] else "llm"
                rates[part] = group["lr"]
                if parameter.grad is not None:
                    squares += parameter.grad.double().square().sum().item()
        self.steps.append({"lr": rates, "grad_norm": squares**0.5})

    def write(self, weights: dict[str, torch.Tensor], **facts) -> None:
        """Write all that was kept, with the final weights and facts of the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "losses": self.losses,
            "steps": self.steps,
            "groups": self.groups,
            "torch": torch.__version__,
            **facts,
        }
        (self.folder / "record.json").write_text(json.dumps(record))
        batches = {
            f"{i}/{key}": array
            for i, batch in enumerate(self.batches)
            for key, array in batch.items()
        }
        np.savez(self.folder / "batches.npz", **batches)
        arrays = {name: tensor.detach().double().numpy() for name, tensor in weights.items()}
        np.savez(self.folder / "weights.npz", **arrays)
