"""Our models and stock LLaVA ones in lmms-eval: `python -m lmms_eval --model llava_bidir --model_args pretrained=DIR`.

Runs in the harness's environment, which finds it by the entry point `lmms_eval.models` in pyproject.toml. The harness's
own `llava_hf` takes one item at a time, crops images to their centre, turns exceptions into empty answers, and would
run a checkpoint whose mask it does not know causally; here prompt, padding and mask are those of training.
"""

import lmms_eval.api.task  # noqa: F401 - changes PIL's settings, which LlavaBidir changes back
import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import ImageFile
from tqdm import tqdm

from llava_bidir.commands.generate import answer, load
from llava_bidir.common.errors import UserError

from .checkpoint import image_attention
from .result_files import ItemError

MANIFEST = ModelManifest("llava_bidir", simple_class_path="llava_bidir.vqa.lmms_model.LlavaBidir")
MAX_NEW_TOKENS = 128  # where a task names none; source: LLaVA eval/model_vqa_loader.py


class LlavaBidir(lmms):
    """A checkpoint as the harness wants it.

    Args:
        pretrained: Directory or hub id of a llava_bidir or llava checkpoint.
        batch_size: Items answered at a time.
        dtype: Of the weights; "auto" is the checkpoint's own.

    Raises:
        UserError: The checkpoint's mask would be dropped, or it is no LLaVA.
    """

    def __init__(self, pretrained: str, batch_size: int | str = 1, dtype: str = "auto", **unknown):
        super().__init__()
        if unknown.keys() - {"max_batch_size", "device"}:
            raise UserError(f"model_args: unknown {', '.join(unknown)}; there is pretrained, dtype")
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # or what a cut file lacks would be grey
        self.image_attention = image_attention(pretrained)
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.model, self.processor = load(pretrained, dtype)
        self.model.to(self.device)

    @torch.no_grad()
    def generate_until(self, requests) -> list[str]:
        """Greedy answers, in order. The tasks' `until` is not used: LLaVA ends an answer with its eos.

        Raises:
            ItemError: Names the items that could not be answered.
        """
        answers = []
        for start in tqdm(range(0, len(requests), self.batch_size), desc="answering", disable=self.rank > 0):
            batch = [request.args for request in requests[start : start + self.batch_size]]
            images = [self._images(*args) for args in batch]
            items = ", ".join(str(args[3]) for args in batch)
            try:
                answers += answer(
                    self.model, self.processor, [args[0] for args in batch], images, _max_new_tokens(batch[0][1])
                )
            except Exception as error:
                raise ItemError(f"item {items}: {type(error).__name__}: {error}") from error
        return answers

    def _images(self, context, options, doc_to_visual, item, task, split) -> list:
        try:
            return doc_to_visual(self.task_dict[task][split][item])
        except Exception as error:
            raise ItemError(f"item {item}, its image: {type(error).__name__}: {error}") from error

    def clean(self) -> None:
        """Keeps the model, which the harness would drop after a task: the next one needs it."""

    def loglikelihood(self, requests):
        raise NotImplementedError("llava_bidir generates answers; it has no likelihoods of given ones")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("llava_bidir answers in one round")


def _max_new_tokens(options: dict) -> int:
    """Raises ValueError where a task asks for anything but greedy decoding."""
    if options.get("do_sample") or options.get("temperature") or options.get("num_beams", 1) != 1:
        raise UserError(f"answers are decoded greedily, but the task wants {options}")
    return options.get("max_new_tokens", MAX_NEW_TOKENS)
