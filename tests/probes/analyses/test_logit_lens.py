"""Classes and words of the explorer against the stock model's own forward."""

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from tolerances import rounding
from transformers import AutoModelForImageTextToText, AutoTokenizer

from probes.analyses.explore.readout import (
    blocked_patches,
    explore,
    grid_box,
    most_confused,
    token_text,
)
from probes.analyses.knockout.cases import ConfusionCase
from probes.ops.geometry import Geometry, ResizeRule
from probes.results.probe_run import ProbeRun

pytestmark = pytest.mark.numerics

IMAGES = [0, 2, 3]
DEPTH = 7  # layers from the pixels to the words, softmax included


@pytest.fixture(params=["causal", "bidirectional"])
def run(request, runs) -> ProbeRun:
    return runs[request.param]


def stock_states(run: ProbeRun, image: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By site, states f[T, d] and lm_head(norm(states)) f[T, V] at image positions of the model's own forward."""
    mllm = run.mllm()
    model = AutoModelForImageTextToText.from_pretrained(run.metrics["mllm"]).eval()
    ids = torch.cat(
        [mllm.prefix_ids, torch.full((1, tiny_models.TOKENS), model.config.image_token_id)], dim=1
    )
    pixels = mllm.preprocess([run.dataset()[image]["image"]])
    before = []
    norm = model.model.language_model.norm
    norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    with torch.no_grad():
        output = model(
            input_ids=ids,
            pixel_values=pixels,
            output_hidden_states=True,
        )
    *hidden, last = output.hidden_states
    states = dict(
        zip(["adapter", *(f"layer_{i:02d}" for i in (1, 2, 3))], [*hidden, before[0]], strict=True)
    )
    words = {site: model.lm_head(norm(x)) for site, x in states.items()} | {
        "final_norm": model.lm_head(last)
    }
    assert torch.equal(words["final_norm"], output.logits)
    return {
        site: (states.get(site, last)[0, -tiny_models.TOKENS :], x[0, -tiny_models.TOKENS :])
        for site, x in words.items()
    }


@torch.no_grad()
def test_classes_and_words_equal_the_stock_forward(run):
    explored = explore(run, IMAGES, top_classes=2, top_words=3)
    saved = load_file(run.path / "probes.safetensors")
    assert explored.word_sites == [site for site in explored.sites if site != "encoder"]
    for image in explored.images:
        reading = image.readings["none"]
        for site, (states, logits) in stock_states(run, image.image).items():
            s = explored.sites.index(site)
            w = explored.word_sites.index(site)
            probe = {
                name.removeprefix(f"{site}."): tensor.double() for name, tensor in saved.items()
            }
            normed = (states.double() - probe["norm.running_mean"]) / (
                probe["norm.running_var"] + 1e-5
            ).sqrt()
            shares = (normed @ probe["head.weight"].T + probe["head.bias"]).exp()
            shares = shares / shares.sum(1, keepdim=True)
            best = shares.argsort(1, descending=True)[:, :2]
            assert torch.equal(reading.classes[:, s].T, best)
            expected = shares.gather(1, best).float()
            torch.testing.assert_close(
                reading.class_probabilities[:, s].T, expected, **rounding(expected, DEPTH)
            )
            words = logits.double().softmax(1).sort(1, descending=True)
            expected = words.values[:, :3].float()
            torch.testing.assert_close(
                reading.word_probabilities[:, w].T, expected, **rounding(expected, DEPTH)
            )
            assert torch.equal(reading.words[:, w].T, words.indices[:, :3])


def test_text_of_a_token_is_visible(run):
    tokenizer = AutoTokenizer.from_pretrained(run.metrics["mllm"])
    text = {
        name: token_text(tokenizer, tokenizer.convert_tokens_to_ids(name))
        for name in ("▁sky", "▁", "<0xE2>", "a")
    }
    assert text == {
        "▁sky": "sky",
        "▁": "▁",
        "<0xE2>": "<0xE2>",
        "a": "a",
    }
    assert token_text(tokenizer, len(tokenizer)) == f"<row {len(tokenizer)}>"


def test_random_tokens_are_those_of_the_knockout():
    """As many tokens, and none of high norm while others are left."""
    tokens = torch.arange(24)
    states = torch.ones(24, 8)
    states[11] *= 10
    blocked = {"incorrect": tokens < 4, "correct": (tokens >= 4) & (tokens < 9)}
    case = ConfusionCase(
        0,
        0,
        4,
        5,
        1,
        2,
        tokens < 4,
        torch.full((24,), 2),
        blocked,
    )
    for seed in range(20):
        drawn = blocked_patches(
            case, ["random_correct", "correct"], states, np.random.default_rng(seed)
        )
        assert drawn["random_correct"].sum() == 5
        assert not drawn["random_correct"][11]
        assert drawn["correct"] is blocked["correct"]


def test_most_confused_class_counts_labelled_patches_only():
    predicted = torch.tensor([[1, 1, 1, 2, 2, 0]] * 2)
    truth = torch.tensor([-1, -1, 0, 0, 1, 0])
    case = most_confused(predicted, truth, 7, [0, 1, 2])
    assert (case.image, case.wrong_class, case.patches) == (7, 2, 2)
    assert most_confused(predicted, truth, 7, [0]) is None
    assert most_confused(predicted, truth, 7, [1]).wrong_class == 1


def test_words_and_conditions_can_be_left_out(run):
    (image,) = explore(run, [1], conditions=[], word_sites=[]).images
    assert list(image.readings) == ["none"]
    assert image.readings["none"].words.numel() == 0
    assert image.case is None
    explored = explore(run, [1], word_sites=["layer_02"], top_words=1)
    assert explored.word_sites == ["layer_02"]
    assert explored.images[0].readings["none"].words.shape == (1, 1, 4)


def test_a_run_without_a_probe_at_the_adapter_is_shown_without_conditions_with_a_warning(
    run, monkeypatch, caplog
):
    probes = {site: probe for site, probe in run.probes().items() if site != "adapter"}
    monkeypatch.setattr(ProbeRun, "probes", lambda _: probes)
    (image,) = explore(run, [0]).images
    assert list(image.readings) == ["none"]
    assert "has no probe at the adapter, which finds the patches to block" in caplog.text


def test_word_head_of_the_final_norm_norms_once(run):
    mllm = run.mllm()
    states = torch.randn(1, 4, mllm.widths["final_norm"])
    norm = mllm.model.model.language_model.norm
    norm.weight.data = (
        torch.rand(norm.weight.shape) + 0.5
    )  # with ones in it, norming twice would change nothing
    torch.testing.assert_close(
        mllm.word_head("layer_01")(states), mllm.word_head("final_norm")(norm(states))
    )


def test_box_of_a_padded_image_exceeds_it():
    padded = Geometry((2, 2), 8, 8, ResizeRule("pad")).view((4, 8))
    assert grid_box(padded, (4, 8)) == (0.0, -0.5, 1.0, 2.0)
    border = Geometry((27, 27), 384, 378).view((100, 200))
    assert grid_box(border, (100, 200)) == pytest.approx((0, 0, 378 / 384, 378 / 384))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"images": [9]}, r"--images: 9 is unknown; the validation split of .* has 0..8"),
        (
            {"conditions": ["none"]},
            "--conditions: 'none' is unknown; the knockout has incorrect, correct, random_",
        ),
        ({"classes": ["moon"]}, "--classes: 'moon' is unknown; .* has sky, wall, road"),
        (
            {"word_sites": ["encoder"]},
            "--word-sites: 'encoder' is unknown; .*, from the adapter on, has adapter, layer_01",
        ),
        ({"top_words": 999}, "asked for the 999 most probable of [0-9]+ at adapter; ask for fewer"),
        ({"top_words": 0}, "--top-classes 3 and --top-words 0 must both be at least 1"),
    ],
)
def test_bad_arguments_are_errors(runs, argument, message):
    with pytest.raises(ValueError, match=message):
        explore(runs["causal"], **({"images": [0]} | argument))
