"""Generate from exports; run as a script, it does so in a process that can import neither package.

python -I tests/helpers/without_package.py EXPORT ...     # a line of JSON
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    # An import of either fails, even if it is installed
    sys.modules |= dict.fromkeys(("llava_bidir", "probes"))

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

IMAGES = [Image.effect_noise((12, 8), sigma).convert("RGB") for sigma in (40, 80, 120)]


def message(text: str, *images: Image.Image) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


CHATS = [
    message("name the sky", *IMAGES[:2]),
    message("name a wall of this road", IMAGES[2]),
    message("and the rest of it"),
]
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
}


def answers_elsewhere(exports: list[str], folder: Path) -> list[dict[str, list]]:
    """Return the answers of a process without the packages, whose modules go into `folder`."""
    environment = {
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "",
    }
    command = [sys.executable, "-I", __file__, *exports]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def read(export: str, **options):
    return AutoModelForImageTextToText.from_pretrained(export, **options)


@torch.no_grad()
def features(model, processor) -> list:
    """Return what the LLM is fed of each image."""
    pixels = processor.image_processor(IMAGES, return_tensors="pt")["pixel_values"]
    return [image.tolist() for image in model.get_image_features(pixels).pooler_output]


@torch.no_grad()
def answers(export: str, **options) -> dict[str, list]:
    """Return what a model reads of images, and says by each way to generate, when saved again, and by a pipeline."""
    model = read(export, **options)
    processor = AutoProcessor.from_pretrained(export, **options)
    processor.tokenizer.padding_side = "left"
    inputs = processor.apply_chat_template(
        CHATS,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "return_tensors": "pt"},
    )
    fixed = {
        "max_new_tokens": 4,
        "do_sample": False,
        "suppress_tokens": [model.config.image_token_id],
    }
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = read(folder, **options)
    said = {way: model.generate(**inputs, **fixed, **more).tolist() for way, more in WAYS.items()}
    said["features"] = features(model, processor)
    said["saved again"] = again.generate(**inputs, **fixed).tolist()
    pipe = pipeline("image-text-to-text", model=export, **options)
    texts = pipe(
        CHATS[:2],
        batch_size=2,
        return_full_text=False,
        generate_kwargs=fixed | {"max_length": None},
    )
    said["pipeline"] = [text[0]["generated_text"] for text in texts]
    return said


if __name__ == "__main__":
    print(json.dumps([answers(path, trust_remote_code=True) for path in sys.argv[1:]]))
