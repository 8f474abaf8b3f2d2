"""`llava-bidir generate`: answer questions about photos."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    TextStreamer,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_bidir.command_options import GenerateOptions
from llava_bidir.common.arguments import check_is_list
from llava_bidir.common.errors import UserError
from llava_bidir.common.greedy import FiniteLogits, greedy_config
from llava_bidir.common.hf_loading import load_weights, read_pretrained
from llava_bidir.common.image_io import is_photo, read_photo
from llava_bidir.common.tokenizer import start_ids
from llava_bidir.data.collate import pad, to_pixels
from llava_bidir.data.conversation import IMAGE, encode
from llava_bidir.model import modeling_llava_bidir  # noqa: F401 - registers our models with the Auto classes
from llava_bidir.model.build import own_prompt, prompt_template


def generate(
    model: str,
    photos: Sequence[Path],
    prompts: Sequence[str],
    max_new_tokens: int = 256,
    dtype: str = "auto",
) -> Iterator[list[str]]:
    """Return the greedy answers to all prompts about each photo, one photo at a time, as they are ready.

    A single answer is also streamed to the terminal. Answers that were cut are named on stderr.

    Args:
        model: Directory or hub id of a checkpoint, ours or transformers' llava.
        photos: Files of the photos. Each is asked about by itself, turned as its EXIF tag says.
        prompts: Questions about each photo.
        max_new_tokens: Maximum tokens per answer.
        dtype: "bfloat16", "float16", "float32", or "auto" for that of the checkpoint.

    Raises:
        UserError: A photo cannot be read; all are looked at before the model is loaded.
    """
    check_is_list("photos", photos, "['a.jpg', 'b.jpg']")
    check_is_list("prompts", prompts, "['What is it?']")
    for photo in photos:
        read_photo(photo)
    return _answers_by_photo(
        model,
        photos,
        list(prompts),
        max_new_tokens,
        dtype,
    )


def _answers_by_photo(
    model: str,
    photos: Sequence[Path],
    prompts: list[str],
    max_new_tokens: int,
    dtype: str,
) -> Iterator[list[str]]:
    loaded, processor = load(model, dtype)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    streamer = None
    if len(photos) == len(prompts) == 1:
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for photo in photos:
        images = [[read_photo(photo)]] * len(prompts)
        answers = answer_and_tell_cut(loaded, processor, prompts, images, max_new_tokens, streamer)
        for prompt, (_, cut_at) in zip(prompts, answers, strict=True):
            if cut_at is not None:
                if cut_at == max_new_tokens:
                    limit = "--max-new-tokens"
                else:
                    limit = "the LLM has no positions left"
                about = f" about {photo}" if len(photos) > 1 else ""
                print(
                    f"the answer to {prompt!r}{about} was cut after {cut_at} tokens ({limit})",
                    file=sys.stderr,
                )
        yield [text for text, _ in answers]


def photos_and_prompts(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the photos and the questions of a command line, `IMAGE ... PROMPT ...`.

    The first word is a photo. So is each further one that is an existing picture, or has the suffix of one: a mistyped
    name is an error and not a question.

    Raises:
        UserError: There is no question, or a photo follows a question.
    """
    photos = [Path(words[0])]
    prompts: list[str] = []
    for word in words[1:]:
        if not is_photo(word):
            prompts.append(word)
        elif prompts:
            raise UserError(
                f"photo {word!r} follows the question {prompts[-1]!r}; expected all photos before it"
            )
        else:
            photos.append(Path(word))
    if not prompts:
        raise UserError(
            f"there is no question after {photos[-1]}; expected MODEL IMAGE ... PROMPT ..."
        )
    return photos, prompts


def load(model: str, dtype: str = "auto") -> tuple[PreTrainedModel, LlavaProcessor]:
    """Return model and processor of a checkpoint, ours or transformers' llava.

    Released llava checkpoints use CLIP's processor, which crops. LLaVA-1.5 was evaluated on padded images, so their
    images are padded here. Source: LLaVA mm_utils.py process_images.

    Raises:
        UserError: There is no such checkpoint, it is no LLaVA, its mask would be ignored, or its model and its
            tokenizer take other ids for images.
    """
    # first, since these errors say more than those of the weights
    read_image_attention(read_pretrained("MODEL", AutoConfig, model))
    loaded = load_weights("MODEL", AutoModelForImageTextToText, model, dtype=dtype).eval()
    processor = read_pretrained("MODEL", AutoProcessor, model)
    index = loaded.config.image_token_id
    if index != processor.image_token_id:
        raise UserError(
            f"MODEL: image_token_index of {model}/config.json is {index}, but the id of {IMAGE} in its tokenizer is "
            f"{processor.image_token_id}; correct config.json"
        )
    loaded.generation_config = greedy_config(loaded.generation_config, processor.tokenizer)
    images = processor.image_processor
    if images.do_pad is None:  # CLIP's processor has no such option
        names = ("size", "crop_size", "image_mean", "image_std", "resample")
        settings = {name: getattr(images, name) for name in names}
        processor.image_processor = LlavaImageProcessorPil(do_pad=True, **settings)
    return loaded, processor


def read_image_attention(config) -> str:
    """Return the attention mask of a checkpoint.

    Raises:
        UserError: It is no LLaVA, or a stock `llava` that names a mask, which transformers would ignore.
    """
    mask = getattr(config, "image_attention", "causal")
    if config.model_type != "llava_bidir" and (config.model_type, mask) != ("llava", "causal"):
        expected = "expected a llava_bidir, or a causal llava"
        raise UserError(f"MODEL is a {config.model_type} under the mask {mask!r}; {expected}")
    return mask


def answer(
    model: PreTrainedModel,
    processor: LlavaProcessor,
    questions: list[str],
    images: list[list[Image.Image]],
    max_new_tokens: int,
) -> list[str]:
    """Return greedy answers to a batch of questions; see :func:`answer_and_tell_cut`."""
    return [
        text for text, _ in answer_and_tell_cut(model, processor, questions, images, max_new_tokens)
    ]


def answer_and_tell_cut(
    model: PreTrainedModel,
    processor: LlavaProcessor,
    questions: list[str],
    images: list[list[Image.Image]],
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
) -> list[tuple[str, int | None]]:
    """Return greedy answers to a batch of questions, each in the prompt of :func:`prompt_ids`, padded on the left.

    With each answer comes the number of tokens after which it was cut, None if it ended by itself.

    Args:
        model: Our model or transformers' llava.
        processor: Processor of the model.
        questions: Questions without `<image>`.
        images: Images per question, placed before the text.
        max_new_tokens: Maximum tokens per answer; fewer if the LLM has no positions left.
        streamer: Prints the answer during generation.

    Raises:
        UserError: A prompt exceeds the LLM's positions, or logits are NaN or infinite.
    """
    check_is_list("questions", questions, "['What is it?']")
    tokenizer = processor.tokenizer
    positions = model.config.get_text_config().max_position_embeddings
    image_tokens = model.config.image_seq_length
    template = prompt_template(processor)
    rows = [
        prompt_ids(processor, template, text, len(own_images), image_tokens)
        for text, own_images in zip(questions, images, strict=True)
    ]
    longest = max(map(len, rows))
    if longest >= positions:
        limit = f"the LLM has {positions} positions (max_position_embeddings)"
        raise UserError(f"a prompt has {longest} tokens, but {limit}; shorten it")
    # per row, so that an answer does not depend on the other rows of its batch
    limits = [min(max_new_tokens, positions - len(row)) for row in rows]
    inputs = {
        "input_ids": pad(rows, tokenizer.pad_token_id, "left"),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, "left"),
    }
    if all_images := [image for own_images in images for image in own_images]:
        inputs["pixel_values"] = to_pixels(processor, all_images).to(model.dtype)
    output = model.generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(limits),
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        logits_processor=[FiniteLogits()],
    )
    answers = [ids[longest : longest + limit] for ids, limit in zip(output, limits, strict=True)]
    ends = model.generation_config.eos_token_id  # one, several or None
    ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=output.device).view(
        -1
    )
    cut = [
        None if torch.isin(ids, ends).any() else limit
        for ids, limit in zip(answers, limits, strict=True)
    ]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [(text.strip(), cut_at) for text, cut_at in zip(texts, cut, strict=True)]


def prompt_ids(
    processor: LlavaProcessor,
    template: str | None,
    question: str,
    images: int,
    image_tokens: int,
) -> list[int]:
    """Return the token ids of the prompt for the answer to a question.

    Args:
        processor: Of the model.
        template: From :func:`llava_bidir.model.build.prompt_template`: that of the training, or None for the
            checkpoint's own chat template.
        question: Without `<image>`.
        images: Number of images before the text.
        image_tokens: T, image tokens per image.
    """
    tokenizer = processor.tokenizer
    if template is not None:
        turns = [{"from": "human", "value": f"{IMAGE}\n{question}" if images else question}]
        tokens = image_tokens * images or None
        return encode(turns, tokenizer, template, tokens, processor.image_token_id)[0]
    text = own_prompt(processor, question, images)
    ids = start_ids(tokenizer, text)
    for token in tokenizer.encode(text, add_special_tokens=False):
        ids += [token] * (image_tokens if token == processor.image_token_id else 1)
    return ids


def run(options: GenerateOptions) -> None:
    """Run `llava-bidir generate`."""
    photos, prompts = photos_and_prompts(options.words)
    answers = generate(options.model, photos, prompts, options.max_new_tokens, options.dtype)
    for photo, own_answers in zip(photos, answers, strict=True):
        if len(photos) == len(prompts) == 1:
            continue  # streamed
        if len(photos) > 1:
            print(photo)
        for prompt, text in zip(prompts, own_answers, strict=True):
            print(f"{prompt}\n    {text}", flush=True)
