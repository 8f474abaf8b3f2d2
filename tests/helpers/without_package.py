"""Generate from exports in a process that can import neither package, and compare with stock LLaVA.

    python -I tests/helpers/without_package.py EXPORT ...

All that is generated is compared with one forward of the stock class without a cache, per answer, under a mask that is
written here.
"""

import sys
import tempfile

# An import of either fails, even if it is installed
sys.modules |= dict.fromkeys(("llava_bidir", "probes"))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    pipeline,
)

NEW = 4
IMAGES = [Image.effect_noise((12, 8), sigma).convert("RGB") for sigma in (40, 80, 120)]


def message(text: str, *images: Image.Image) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images] + [
        {"type": "text", "text": text}
    ]
    return [{"role": "user", "content": content}]


CHATS = [
    message("name the sky", *IMAGES[:2]),
    message("name a wall of this road", IMAGES[2]),
    message("and the rest of it"),
]


def mask_of(name: str, is_image: torch.Tensor) -> torch.Tensor:
    """Return the mask bool[N, N] of one sample."""
    positions = torch.arange(len(is_image))
    causal = positions[:, None] >= positions
    if name == "causal":
        return causal
    last = int(is_image.nonzero().max()) if is_image.any() else -1
    block = is_image if name == "bidirectional" else positions <= last
    return causal | (block[:, None] & block)


def check(export: str) -> None:
    """Check all ways to generate from one export."""
    options = {"trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(export, **options)
    processor = AutoProcessor.from_pretrained(export, **options)
    config = {
        k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "auto_map")
    }
    stock = LlavaForConditionalGeneration(LlavaConfig(**config)).eval()
    stock.load_state_dict(model.state_dict())
    image_id = model.config.image_token_id
    name = model.config.image_attention
    processor.tokenizer.padding_side = "left"
    settings = {
        "processor_kwargs": {"padding": True, "return_tensors": "pt"},
        "add_generation_prompt": True,
    }
    inputs = processor.apply_chat_template(
        CHATS,
        tokenize=True,
        return_dict=True,
        **settings,
    )
    pixels = inputs["pixel_values"].split([2, 1, 0])
    width = inputs["input_ids"].shape[1]
    fixed = {
        "min_new_tokens": NEW,
        "max_new_tokens": NEW,
        "do_sample": False,
        "suppress_tokens": [image_id],
    }
    details = {
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
    }

    @torch.no_grad()
    def expected(prompt: int, answer: torch.Tensor) -> torch.Tensor:
        ids = torch.cat(
            [inputs["input_ids"][prompt][inputs["attention_mask"][prompt].bool()], answer]
        )
        mask = mask_of(name, ids == image_id)[None, None]
        views = pixels[prompt] if len(pixels[prompt]) else None
        out = stock(
            input_ids=ids[None],
            attention_mask=mask,
            pixel_values=views,
            use_cache=False,
        )
        return out.logits[0, -NEW - 1 : -1]

    def compare(path: str, generator, **kwargs) -> torch.Tensor:
        out = generator.generate(
            **inputs,
            **fixed | kwargs,
            **details,
        )
        answers = out.sequences[:, width:]
        per_prompt = len(answers) // len(CHATS)
        for row, answer in enumerate(answers):
            logits = expected(row // per_prompt, answer)
            if kwargs.get("num_beams"):
                score = logits.log_softmax(-1).gather(1, answer[:, None]).mean()
                deviation = out.sequences_scores[row] - score
            else:
                deviation = torch.stack(out.logits, 1)[row] - logits
            assert deviation.abs().max() < 1e-3, (
                f"{export}, {path}, row {row}: {deviation.abs().max()} off"
            )
        return answers

    greedy = compare("batch", model)
    compare("static cache", model, cache_implementation="static")
    compare("no cache", model, use_cache=False)
    compare("several sequences", model, do_sample=True, num_return_sequences=2)
    compare("beams", model, num_beams=3, num_return_sequences=2)
    compare("beams, static cache", model, num_beams=2, cache_implementation="static")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        compare("saved again", AutoModelForMultimodalLM.from_pretrained(folder, **options))

    texts = processor.batch_decode(greedy, skip_special_tokens=True)
    pipe = pipeline("image-text-to-text", model=export, **options)
    fixed["max_length"] = None
    for size in (1, 2):
        answers = pipe(
            CHATS[:2],
            batch_size=size,
            return_full_text=False,
            generate_kwargs=fixed,
        )
        # after a prompt, a word keeps the space before it
        answers = [answer[0]["generated_text"].removeprefix(" ") for answer in answers]
        assert answers == texts[:2], (
            f"{export}, pipeline of {size}: {answers}, expected {texts[:2]}"
        )


for path in sys.argv[1:]:
    check(path)
