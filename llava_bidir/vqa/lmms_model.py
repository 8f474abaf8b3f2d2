"""Model adapter of lmms-eval, also for `python -m lmms_eval --model llava_bidir --model_args pretrained=DIR`.

Prompt, padding and mask are those of training. lmms-eval's own `llava_hf` has a batch size of one, crops images, turns
exceptions into empty answers and runs any mask it does not know causally.
"""

import lmms_eval.api.task  # noqa: F401 - sets LOAD_TRUNCATED_IMAGES, which LlavaBidir resets
import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import ImageFile
from tqdm import tqdm

from llava_bidir.commands.generate import answer, load_with_processor
from llava_bidir.common.errors import error_context

MANIFEST = ModelManifest("llava_bidir", simple_class_path="llava_bidir.vqa.lmms_model.LlavaBidir")
MAX_NEW_TOKENS = 128  # default for tasks that set none. Source: LLaVA eval/model_vqa_loader.py


class LlavaBidir(lmms):
    """A llava_bidir or llava checkpoint, a directory or hub id, with the interface of lmms-eval."""

    def __init__(self, pretrained: str, batch_size: int | str = 1, dtype: str = "auto", **unused):
        super().__init__()
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # True fills missing parts of an image with grey
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.model, self.processor = load_with_processor(pretrained, dtype)
        self.model.to(self.device)

    @torch.no_grad()
    def generate_until(self, requests) -> list[str]:
        """Return greedy answers, in order. `until` of the tasks is ignored: LLaVA ends an answer with eos.

        Raises:
            UserError: Items could not be answered, or their images not be read. The message names them.
        """
        answers = []
        steps = range(0, len(requests), self.batch_size)
        for start in tqdm(steps, desc="answering", disable=self.rank > 0):
            batch = [request.args for request in requests[start : start + self.batch_size]]
            with error_context(f"items {', '.join(str(item) for *_, item, _, _ in batch)}"):
                images = [
                    doc_to_visual(self.task_dict[task][split][item])
                    for _, _, doc_to_visual, item, task, split in batch
                ]
                options = batch[0][1]
                if options.get("do_sample") or options.get("temperature"):
                    raise ValueError(f"only greedy decoding is supported, the task sets {options}")
                limit = options.get("max_new_tokens", MAX_NEW_TOKENS)
                questions = [question for question, *_ in batch]
                answers += answer(self.model, self.processor, questions, images, limit)
        return answers

    def clean(self) -> None:
        """Keep the model for the next task. lmms-eval would delete it."""

    def generate_until_multi_round(self, requests):
        """Raise NotImplementedError."""
        raise NotImplementedError("llava_bidir supports generation in a single round only")

    loglikelihood = generate_until_multi_round
