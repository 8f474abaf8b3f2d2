"""Classes and words of the lab against the stock model's own forward."""

from functools import partial

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from tolerances import rounding
from transformers import AutoModelForImageTextToText, AutoTokenizer

from probes.lab.readout import grid_box, most_probable, read_probe, token_text
from probes.models.sites import is_in_llm_space
from probes.ops.geometry import Geometry, ResizeRule
from probes.results.probe_run import ProbeRun

pytestmark = pytest.mark.numerics

IMAGES = [0, 2, 3]
DEPTH = 7  # layers from the pixels to the words, softmax included


@pytest.fixture(params=[0, 1], ids=["causal", "bidirectional"])
def run(request, lab_runs) -> ProbeRun:
    return ProbeRun(lab_runs[request.param])


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
    mllm = run.mllm()
    saved = load_file(run.path / "probes.safetensors")
    heads = {site: partial(read_probe, probe) for site, probe in run.probes().items()}
    word_heads = {site: mllm.word_head(site) for site in run.sites if is_in_llm_space(site)}
    assert list(word_heads) == [site for site in run.sites if site != "encoder"]
    for image in IMAGES:
        found = mllm.states(mllm.preprocess([run.dataset()[image]["image"]]), run.sites)
        classes, class_probabilities = (x[0] for x in most_probable(found, heads, 2))
        words, word_probabilities = (x[0] for x in most_probable(found, word_heads, 3))
        for site, (states, logits) in stock_states(run, image).items():
            s = run.sites.index(site)
            w = list(word_heads).index(site)
            probe = {
                name.removeprefix(f"{site}."): tensor.double() for name, tensor in saved.items()
            }
            normed = (states.double() - probe["norm.running_mean"]) / (
                probe["norm.running_var"] + 1e-5
            ).sqrt()
            shares = (normed @ probe["head.weight"].T + probe["head.bias"]).exp()
            shares = shares / shares.sum(1, keepdim=True)
            best = shares.argsort(1, descending=True)[:, :2]
            assert torch.equal(classes[:, s].T, best)
            expected = shares.gather(1, best).float()
            torch.testing.assert_close(
                class_probabilities[:, s].T, expected, **rounding(expected, DEPTH)
            )
            ranked = logits.double().softmax(1).sort(1, descending=True)
            expected = ranked.values[:, :3].float()
            torch.testing.assert_close(
                word_probabilities[:, w].T, expected, **rounding(expected, DEPTH)
            )
            assert torch.equal(words[:, w].T, ranked.indices[:, :3])


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
