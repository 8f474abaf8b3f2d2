"""Bugs that a re-implementation of LLaVA could have, each put into a copy of the package and compared.

Each copy trains the first steps only, of the schedule of all.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

STEPS = 60


@dataclass(frozen=True)
class Mutation:
    """A change of one place.

    Args:
        name: What the copy does wrong.
        case: Name of the case that is trained again.
        file: In `llava_bidir`.
        old, new: Text that is there once, and what replaces it.
    """

    name: str
    case: str
    file: str
    old: str
    new: str

    def copy(self, folder: Path) -> None:
        """Write the changed package into an empty folder."""
        package = folder / "llava_bidir"
        shutil.copytree("llava_bidir", package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree("configs", folder / "configs")
        file = package / self.file
        text = file.read_text()
        if text.count(self.old) != 1:
            raise SystemExit(f"mutation {self.name!r}: expected once in {self.file}: {self.old}")
        file.write_text(text.replace(self.old, self.new))


PAD = "        side = self.side_px(config)\n        return LlavaImageProcessorPil("
BRIGHTER = """        side = self.side_px(config)
        if not hasattr(LlavaImageProcessorPil, "stock"):
            stock = LlavaImageProcessorPil.stock = LlavaImageProcessorPil.pad_to_square
            LlavaImageProcessorPil.pad_to_square = lambda self, image, background_color: stock(
                self, image, tuple(level + 1 for level in background_color)
            )
        return LlavaImageProcessorPil("""

MUTATIONS = [
    Mutation(
        "warm-up of one step more",
        "stage 1, float64",
        "training/optim.py",
        "math.ceil(steps * warmup_ratio)",
        "math.ceil(steps * warmup_ratio) + 1",
    ),
    Mutation(
        "cosine that ends one step later",
        "stage 1, float64",
        "training/optim.py",
        "math.ceil(steps * warmup_ratio), steps)",
        "math.ceil(steps * warmup_ratio), steps + 1)",
    ),
    Mutation(
        "mean that counts one token too many",
        "stage 2, float64",
        "training/loss.py",
        'max(batch["supervised"], 1)',
        '(batch["supervised"] + 1)',
    ),
    Mutation(
        "mean over the tokens of the step",
        "stage 2, float64",
        "training/module.py",
        'Literal["llava", "tokens"] = "llava"',
        'Literal["llava", "tokens"] = "tokens"',
    ),
    Mutation(
        "weight decay of biases and norms",
        "stage 2, weight decay, adapter's own rate",
        "training/optim.py",
        "len(shape) > 1",
        "True",
    ),
    Mutation(
        "padding one level of 256 brighter", "stage 2, float64", "model/encoders.py", PAD, BRIGHTER
    ),
    Mutation(
        "epsilon of AdamW 1e-6",
        "stage 2, float64",
        "training/optim.py",
        "        betas=betas,\n",
        "        betas=betas,\n        eps=1e-6,\n",
    ),
    Mutation(
        "adapter idle on batches of text",
        "stage 2, float64",
        "training/loss.py",
        "features = features[:0]",
        "features = features[:0].detach()",
    ),
    Mutation(
        "two global batches exchanged",
        "stage 2, float64",
        "data/batch_samplers.py",
        "micro_batches = batches.reshape",
        "batches[[20, 21]] = batches[[21, 20]]\n        micro_batches = batches.reshape",
    ),
    Mutation(
        "end of the answer not trained",
        "stage 2, float64",
        "data/conversation.py",
        "pieces.append((f\" {answer['value']}{tokenizer.eos_token}\", True))",
        "pieces += [(f\" {answer['value']}\", True), (tokenizer.eos_token, False)]",
    ),
]
