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
        name="warm-up of one step more",
        case="stage 1, float64",
        file="training/optim.py",
        old="math.ceil(steps * warmup_ratio)",
        new="math.ceil(steps * warmup_ratio) + 1",
    ),
    Mutation(
        name="cosine that ends one step later",
        case="stage 1, float64",
        file="training/optim.py",
        old="math.ceil(steps * warmup_ratio), steps)",
        new="math.ceil(steps * warmup_ratio), steps + 1)",
    ),
    Mutation(
        name="mean that counts one token too many",
        case="stage 2, float64",
        file="training/loss.py",
        old='max(batch["supervised"], 1)',
        new='(batch["supervised"] + 1)',
    ),
    Mutation(
        name="mean over the tokens of the step",
        case="stage 2, float64",
        file="training/module.py",
        old='Literal["llava", "tokens"] = "llava"',
        new='Literal["llava", "tokens"] = "tokens"',
    ),
    Mutation(
        name="weight decay of biases and norms",
        case="stage 2, weight decay, adapter's own rate",
        file="training/optim.py",
        old="len(shape) > 1",
        new="True",
    ),
    Mutation(
        name="padding one level of 256 brighter",
        case="stage 2, float64",
        file="model/encoders.py",
        old=PAD,
        new=BRIGHTER,
    ),
    Mutation(
        name="epsilon of AdamW 1e-6",
        case="stage 2, float64",
        file="training/optim.py",
        old="        betas=betas,\n",
        new="        betas=betas,\n        eps=1e-6,\n",
    ),
    Mutation(
        name="adapter idle on batches of text",
        case="stage 2, float64",
        file="training/loss.py",
        old="features = features[:0]",
        new="features = features[:0].detach()",
    ),
    Mutation(
        name="two global batches exchanged",
        case="stage 2, float64",
        file="data/batch_samplers.py",
        old="micro_batches = batches.reshape",
        new="batches[[20, 21]] = batches[[21, 20]]\n        micro_batches = batches.reshape",
    ),
    Mutation(
        name="end of the answer not trained",
        case="stage 2, float64",
        file="data/conversation.py",
        old="pieces.append((f\" {answer['value']}{tokenizer.eos_token}\", True))",
        new="pieces += [(f\" {answer['value']}\", True), (tokenizer.eos_token, False)]",
    ),
]
