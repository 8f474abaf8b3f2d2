"""Model adapter of lmms-eval: `python -m lmms_eval --model llava_bidir --model_args pretrained=DIR`.

The harness finds it by the entry point `lmms_eval.models` in pyproject.toml. Prompt, padding and mask are those of
training. The harness's own `llava_hf` has a batch size of one, crops images, turns exceptions into empty answers and
runs any mask it does not know causally.
"""

import lmms_eval.api.task  # noqa: F401 - sets LOAD_TRUNCATED_IMAGES, which LlavaBidir resets
import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import ImageFile
from tqdm import tqdm

from llava_bidir.commands.generate import answer, load
from llava_bidir.common.errors import UserError

from .checkpoint import read_image_attention
from .result_files import ItemError

MANIFEST = ModelManifest("llava_bidir", simple_class_path="llava_bidir.vqa.lmms_model.LlavaBidir")
MAX_NEW_TOKENS = 128  # default for tasks that set none. Source: LLaVA eval/model_vqa_loader.py


class LlavaBidir(lmms):
    """A llava_bidir or llava checkpoint with the interface of the harness.

    Args:
        pretrained: Directory or hub id.
        batch_size: Number of items per batch.
        dtype: Dtype of the weights, "auto" for that of the checkpoint.

    Raises:
        UserError: The model is not a LLaVA, or its mask would be ignored.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        dtype: str = "auto",
        **unknown,
    ):
        super().__init__()
        if unknown.keys() - {"max_batch_size", "device"}:
            raise UserError(
                f"model_args: unknown {', '.join(unknown)}; expected pretrained or dtype"
            )
        # True would fill the missing part of an image with grey
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        self.image_attention = read_image_attention(pretrained)
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.model, self.processor = load(pretrained, dtype)
        self.model.to(self.device)

    @torch.no_grad()
    def generate_until(self, requests) -> list[str]:
        """Return greedy answers, in order. `until` of the tasks is ignored: LLaVA ends an answer with eos.

        Raises:
            ItemError: Items could not be answered. The message names them.
        """
        answers = []
        for start in tqdm(
            range(0, len(requests), self.batch_size), desc="answering", disable=self.rank > 0
        ):
            batch = [request.args for request in requests[start : start + self.batch_size]]
            images = [self._images(*args) for args in batch]
            items = ", ".join(str(args[3]) for args in batch)
            try:
                answers += answer(
                    self.model,
                    self.processor,
                    [args[0] for args in batch],
                    images,
                    _max_new_tokens(batch[0][1]),
                )
            except Exception as error:
                raise ItemError(f"item {items}: {type(error).__name__}: {error}") from error
        return answers

    def _images(
        self,
        context,
        options,
        doc_to_visual,
        item,
        task,
        split,
    ) -> list:
        try:
            return doc_to_visual(self.task_dict[task][split][item])
        except Exception as error:
            raise ItemError(f"item {item}, its image: {type(error).__name__}: {error}") from error

    def clean(self) -> None:
        """Keep the model for the next task. The harness would delete it."""

    def generate_until_multi_round(self, requests):
        """Raise NotImplementedError."""
        raise NotImplementedError("llava_bidir supports generation in a single round only")

    loglikelihood = generate_until_multi_round


def _max_new_tokens(options: dict) -> int:
    """Return the limit of a task. Raise a UserError unless the task decodes greedily."""
    if options.get("do_sample") or options.get("temperature") or options.get("num_beams", 1) != 1:
        raise UserError(f"only greedy decoding is supported, but the task sets {options}")
    return options.get("max_new_tokens", MAX_NEW_TOKENS)
