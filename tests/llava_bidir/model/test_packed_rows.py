"""Rows of several samples with restarting positions and without padding, as padding-free fine-tuning makes them."""

import pytest
import tiny_models
import torch
from reference_llava import llava_logits
from tiny_llms import SLIDING_LLMS, UNMASKED_LLMS
from transformers import DynamicCache

from llava_bidir import IMAGE_ATTENTION
from llava_bidir.model.modeling_llava_bidir import CACHE

MASKS = tuple(IMAGE_ATTENTION)
# samples of two rows of the same length, each with the number of its images
MIXED = (
    (
        ("tiiiitt", 1),
        ("tttt", 0),
        ("iiiiiiii", 2),
    ),
    (
        ("tttt", 0),
        ("iiiit", 1),
        ("ttiiiitttt", 1),
    ),
)
TEXT = (
    (
        ("ttttt", 0),
        ("t", 0),
        ("tttt", 0),
    ),
    (
        ("tt", 0),
        ("ttttttt", 0),
        ("t", 0),
    ),
)
NO_CACHE = (
    {},
    {"use_cache": None},
    {"use_cache": False},
)


def pack(packs) -> tuple[list, dict]:
    """Return the ids of the samples of each row, and the inputs of the model."""
    rows = [[tiny_models.ids(sample)[0][0] for sample, _ in row] for row in packs]
    images = sum(count for row in packs for _, count in row)
    inputs = {
        "input_ids": torch.stack([torch.cat(row) for row in rows]),
        "position_ids": torch.stack([torch.cat([torch.arange(len(x)) for x in r]) for r in rows]),
    }
    return rows, inputs | ({"pixel_values": tiny_models.pixels(images)} if images else {})


@torch.no_grad()
def samples_alone(packs, rows: list, pixels: torch.Tensor | None, logits_of) -> list:
    """Return logits_of(ids, pixels) of each sample, row by row."""
    images = iter([] if pixels is None else pixels)
    return [
        [
            logits_of(ids, torch.stack([next(images) for _ in range(count)]) if count else None)
            for (_, count), ids in zip(row, ids_of_row, strict=True)
        ]
        for row, ids_of_row in zip(packs, rows, strict=True)
    ]


def assert_rows_equal(logits: torch.Tensor, expected: list) -> None:
    for found, row in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, torch.cat(row), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packs", [MIXED, TEXT], ids=["mixed", "text"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_packed_samples_equal_each_sample_alone(packs, name, backend):
    """Each sample alone is computed by attention that is written out."""
    model = tiny_models.model(name, backend)
    rows, inputs = pack(packs)
    expected = samples_alone(
        packs, rows, inputs.get("pixel_values"), lambda *sample: llava_logits(model, name, *sample)
    )
    for options in NO_CACHE:
        out = model(**inputs, **options)
        assert_rows_equal(out.logits, expected)
        assert out.get(CACHE) is None
    embedded = inputs | {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "input_ids": None,
    }
    assert_rows_equal(model.train()(**embedded).logits, expected)


@pytest.mark.parametrize("packs", [MIXED, TEXT], ids=["mixed", "text"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("llm", SLIDING_LLMS)
def test_packed_samples_stay_apart_under_sliding_windows(packs, llm, name):
    model = tiny_models.model(name, text_config=SLIDING_LLMS[llm])
    rows, inputs = pack(packs)

    def logits_alone(ids, pixels):
        return model(input_ids=ids[None], pixel_values=pixels).logits[0]

    expected = samples_alone(packs, rows, inputs.get("pixel_values"), logits_alone)
    assert_rows_equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("name", MASKS)
def test_a_cache_of_packed_rows_is_refused(name):
    """Tokens that follow would attend to all samples of the row."""
    model = tiny_models.model(name)
    for packs in (MIXED, TEXT):
        _, inputs = pack(packs)
        for options in ({"use_cache": True}, {CACHE: DynamicCache(config=model.config)}):
            with pytest.raises(ValueError, match="position_ids restart within a row"):
                model(**inputs, **options)
        with pytest.raises(ValueError, match="position_ids restart within a row"):
            model.generate(
                **inputs,
                max_new_tokens=2,
                do_sample=False,
            )


@pytest.mark.parametrize("kind", UNMASKED_LLMS)
def test_layers_that_would_mix_packed_samples_are_refused(kind):
    model = tiny_models.model("causal", text_config=UNMASKED_LLMS[kind])
    for packs in (MIXED, TEXT):
        _, inputs = pack(packs)
        with pytest.raises(ValueError, match=f"{kind} layers, which take no mask, so its samples"):
            model(**inputs)


def masks_of(model, **inputs) -> list:
    """Return the attention masks that the LLM's decoder gets and the value of use_cache in a forward."""
    got = []

    def read(_, args, kwargs):
        got.extend([kwargs.get("attention_mask"), kwargs.get("use_cache")])
        raise InterruptedError

    handle = model.model.language_model.register_forward_pre_hook(read, with_kwargs=True)
    with pytest.raises(InterruptedError):
        model(**inputs)
    handle.remove()
    return got


def test_a_row_of_one_sample_keeps_the_fast_kernel():
    """A 4D mask would take sdpa's kernel for causal attention from it."""
    model = tiny_models.model("causal")
    ids, _ = tiny_models.ids("tiiiittt")
    positions = torch.arange(ids.shape[1])[None]
    for given in ({}, {"position_ids": positions}, {"position_ids": positions + 3}):
        mask, use_cache = masks_of(
            model,
            input_ids=ids,
            pixel_values=tiny_models.pixels(1),
            **given,
        )
        assert mask is None
        assert use_cache is None


def test_flash_attention_tells_samples_apart_in_one_row_and_is_refused_for_several():
    """transformers reads the positions of a batch of one row only, and only without a cache."""
    model = tiny_models.model("causal")
    model.config.text_config._attn_implementation = "flash_attention_2"
    _, inputs = pack(MIXED[:1])
    assert masks_of(model, **inputs) == [None, False]
    _, inputs = pack(MIXED)
    with pytest.raises(ValueError, match="samples packed into a row would attend to each other"):
        model(**inputs)


@pytest.mark.slow
def test_packed_samples_stay_apart_in_a_compiled_model():
    model = tiny_models.model("causal")
    rows, inputs = pack(TEXT)
    expected = samples_alone(
        TEXT, rows, None, lambda *sample: llava_logits(model, "causal", *sample)
    )
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_rows_equal(compiled(**inputs).logits, expected)
