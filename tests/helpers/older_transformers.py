"""Answer with exports in another transformers than ours, as those do who serve them.

    PYTHONPATH=FOLDER_OF_TRANSFORMERS python tests/helpers/older_transformers.py VERSION OUT EXPORT ...

Writes {export: answer} by torch.save.
"""

import sys

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

PROMPT = "USER: <image>\nname the sky ASSISTANT:"


@torch.no_grad()
def answer(export: str, with_processor: bool) -> dict[str, torch.Tensor]:
    """Return logits and the tokens of a greedy answer, to inputs of the export's own processor or to fixed ones."""
    model = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).eval()
    image = Image.linear_gradient("L").resize((12, 8)).convert("RGB")
    if with_processor:
        processor = AutoProcessor.from_pretrained(export)
        inputs = dict(processor(images=image, text=PROMPT, return_tensors="pt"))
    else:
        config = model.config
        side = config.vision_config.image_size
        image_ids = [config.image_token_id] * config.image_seq_length
        inputs = {
            "input_ids": torch.tensor([[1, 7, *image_ids, *range(20, 60)]]),
            "pixel_values": torch.linspace(-2, 2, 3 * side * side).view(1, 3, side, side),
        }
    logits = model(**inputs).logits
    return inputs | {
        "logits": logits,
        "answer": model.generate(**inputs, max_new_tokens=4, do_sample=False),
    }


if __name__ == "__main__":
    version, out, *exports = sys.argv[1:]
    assert transformers.__version__ == version
    answers = {export: answer(export, i == 0) for i, export in enumerate(exports)}
    torch.save(answers, out)
