"""Answers of every family on a tiny random model, against the stock model's own generation and forward.

The stock model has masks and replaced states written out. Ids, masks and inputs come from `tiny_families`, positions
from the stock forward. Nothing is cached.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import pytest
import tiny_families
import torch
from PIL import Image
from tiny_families import IMAGE_ID, SEVERAL_WAYS_IN, STOCK, WORDS, asked_ids, pictures, stock_inputs
from tolerances import assert_near
from torch import Tensor, nn

import probes
from probes import Knockout

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("small_squares")]

# LLaVA-NeXT's and OneVision's stock forward wants tiles; LLMs and features are those of other families
ALL = sorted({*STOCK} - {"llava_next", "llava_onevision"})
# one family of each kind of cache, mask and positions
CACHES = """
llava gemma3 gemma4 gemma4_unified paligemma mistral3 qwen2_vl qwen3_vl qwen3_5 kimi_k25 lfm2_vl exaone4_5
""".split()
DEPTH = 3 + 3 + 1  # encoder and adapter, layers, word head
EOS = 2


def with_mask(mask, _, args, kwargs):
    """Give attention another mask."""
    return args, kwargs | {"attention_mask": mask}


def with_states(image, function, _, args, kwargs):
    """Give a layer what a function makes of the states of the image."""
    states = (args[0] if args else kwargs.pop("hidden_states")).clone()
    states[:, image] = function(states[:, image])
    return (states, *args[1:]), kwargs


@dataclass(frozen=True)
class StockModel:
    """A stock model that is asked about images by its own forward."""

    name: str
    model: nn.Module
    images: Sequence[Image.Image]

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(STOCK[self.name].decoder).layers

    def masks(self, sets: dict[str, Tensor], knockout: Knockout | None) -> list[Tensor]:
        """Return one additive mask per layer, f[B, 1, N, N]: 0 where a query may attend, else -inf."""
        image = sets["image"]
        key = torch.arange(len(image))
        query = key[:, None]
        native = STOCK[self.name].native
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(self.layers)
        masks = []
        for number, kind in enumerate(kinds, 1):
            allowed = key <= query
            sliding = kind == "sliding_attention"
            if native == "bidirectional" or (native == "bidirectional_sliding" and sliding):
                allowed = allowed | (image[:, None] & image)
            elif native == "prefix":
                allowed = allowed | ~(sets["answer"][:, None] | sets["answer"])
            if sliding:  # among image tokens, too
                allowed = allowed & (query - key < config.sliding_window)
            allowed = allowed.expand(len(self.images), -1, -1)
            if knockout and (knockout.layers is None or number in knockout.layers):
                rows = sum(sets[name] for name in knockout.rows) > 0
                columns = torch.zeros(len(self.images), len(image), dtype=torch.bool)
                if knockout.blocked is None:
                    columns[:] = sum(sets[name] for name in knockout.columns) > 0
                else:
                    columns[:, image] = knockout.blocked
                allowed = allowed & ~(rows[:, None] & columns[:, None])
            masks.append(torch.where(allowed, 0.0, -torch.inf)[:, None])
        return masks

    def logits(self, ids: Tensor, answer: int, change: dict | None = None) -> Tensor:
        """Return the logits of the forward for ids long[N] with an answer at their end.

        `change` has the arguments of the package: a knockout, and hooks at adapter and layers; {} writes out the mask
        that the model has by itself.
        """
        place = torch.arange(len(ids))
        image = ids == IMAGE_ID
        last = place[image][-1]
        end = len(ids) - answer  # the last token of the prompt is the template's
        sets = {
            "image": image,
            "question": (place > last) & (place < end - 1),
            "last": place == end - 1,
            "answer": place >= end,
        }
        with ExitStack() as stack:
            if change is not None and STOCK[self.name].masks:
                masks = self.masks(sets, change.get("knockout"))
                for layer, mask in zip(self.layers, masks, strict=True):
                    attention = layer.self_attn
                    use = partial(with_mask, mask)
                    handle = attention.register_forward_pre_hook(use, with_kwargs=True)
                    stack.callback(handle.remove)
            for site, function in (change or {}).get("hooks", {}).items():
                number = 0 if site == "adapter" else int(site.removeprefix("layer_"))
                use = partial(with_states, image, function)
                handle = self.layers[number].register_forward_pre_hook(use, with_kwargs=True)
                stack.callback(handle.remove)
            inputs = stock_inputs(self.name, images=self.images, ids=ids, answer=answer)
            return self.model(use_cache=False, **inputs).logits

    @torch.no_grad()
    def score(self, question: list[int], answer: list[int], change: dict | None = None) -> Tensor:
        """Return the log-probability of an answer about each image, f[B]."""
        ids, _ = asked_ids(self.name, question, answer)
        logits = self.logits(ids, len(answer), change)[:, -len(answer) - 1 : -1]
        return logits.log_softmax(-1)[:, range(len(answer)), answer].sum(1)

    @torch.no_grad()
    def generate(self, question: list[int], tokens: int) -> list[str]:
        """Return the answer of the model's own generation about each image, without the end token."""
        ids, _ = asked_ids(self.name, question)
        inputs = stock_inputs(self.name, images=self.images, ids=ids, answer=0)
        found = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        rows = [[*row, EOS] for row in found[:, len(ids) :].tolist()]
        return [spoken(row[: row.index(EOS)]) for row in rows]

    @torch.no_grad()
    def generate_uncached(self, question: list[int], tokens: int, change: dict) -> str:
        """Return the greedy answer about one image by complete forwards."""
        answer = []
        while len(answer) < tokens:
            ids, _ = asked_ids(self.name, question, answer)
            token = int(self.logits(ids, len(answer), change)[0, -1].argmax())
            if token == EOS:
                break
            answer.append(token)
        return spoken(answer)


HELLO = WORDS["hello"]
QUESTIONS = {"hello": [HELLO], "hellohellohello": [HELLO] * 3}
ANSWERS = ["hello", "hellohello"]


def spoken(tokens: list[int]) -> str:
    """Return ids as text, in place of what a tokenizer decodes, so that special ones are compared, too."""
    return " ".join(map(str, tokens))


def interventions(name: str, images: int) -> list[dict]:
    """Return arguments of the package, of the interventions that a family can take."""
    stock = STOCK[name]
    changes_of_family = []
    text = {}
    if stock.masks:
        # other tokens of each image, never the first one, which may be all that a token sees
        place = torch.arange(stock.grid[0] * stock.grid[1])
        blocked = [(place > 0) & ((place + image) % 3 == 1) for image in range(images)]
        changes_of_family.append({"knockout": Knockout(torch.stack(blocked), rows=["image"])})
        seen = ["image", "question"]
        text["knockout"] = Knockout(layers=[1, 3], rows=["last", "answer"], columns=seen)
    if stock.native == "prefix":
        changes_of_family.append({"knockout": Knockout(rows=["image"], columns=["question"])})
    if name not in SEVERAL_WAYS_IN:
        text["hooks"] = {
            "adapter": lambda states: states.flip(1),
            "layer_02": lambda states: states * 0.5,
        }
    return [*changes_of_family, text]


@pytest.fixture
def mllm(load_family, monkeypatch):
    def load(name: str):
        read = load_family(name)
        monkeypatch.setattr(read.chat.tokenizer, "decode", lambda ids, **_: spoken(ids))
        return read

    return load


def check(name: str, read) -> None:
    """Compare greedy answers and scores of two images with the stock model's generation, cached, and forward."""
    images = pictures(name)
    pixels = read.preprocess(images)
    stock = StockModel(name, read.model, images)
    for text, question in QUESTIONS.items():
        ids, _ = asked_ids(name, question)
        assert [*read.ids[0].tolist(), *read.chat.question_ids(text)] == ids.tolist()
    answer_read = read.answer(images, text, max_new_tokens=4)
    assert answer_read == stock.generate(question, 4)
    assert any(answer_read), "nothing is compared with nothing"
    answers = read.chat.answer_ids(ANSWERS)
    plain = read.answer_log_probs(pixels, "hello", ANSWERS)
    # None: the model's own mask, to which the written one is equal
    for change in (None, {}, *interventions(name, len(images))):
        scores = read.answer_log_probs(pixels, question="hello", answers=ANSWERS, **change or {})
        expected = torch.stack([stock.score([HELLO], answer, change) for answer in answers], 1)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
        assert not change or (scores - plain).abs().amax(1).min() > 1e-4, f"{change} does nothing"


@pytest.mark.parametrize("name", ALL)
def test_answers_and_scores_equal_the_stock_model_with_masks_and_states_written_out(name, mllm):
    check(name, mllm(name))


def test_answers_of_a_soft_capped_llm_that_runs_eagerly(tmp_path):
    """PaliGemma 2: transformers has no sdpa for Gemma 2, so that masks are added to its scores."""
    text = {"model_type": "gemma2", "attn_logit_softcapping": 2.0}
    path = tiny_families.write("paligemma", folder=tmp_path, attention="eager", **text)
    read = probes.load(path)
    read.chat.tokenizer.decode = lambda ids, **_: spoken(ids)
    check("paligemma", read)


@pytest.mark.parametrize("name", CACHES)
def test_cached_answers_equal_uncached_ones(name, mllm):
    read = copy.deepcopy(mllm(name))
    # an uncached forward would take a placeholder for a part of the image: it is never generated
    read.model.get_output_embeddings().weight[IMAGE_ID] = 0
    images = pictures(name, 1)
    stock = StockModel(name, read.model, images)
    answers = []
    for change in interventions(name, 1):
        answers.append(read.answer(images, "hello", max_new_tokens=4, **change)[0])
        assert answers[-1] == stock.generate_uncached([HELLO], 4, change), change
    assert any(answers)


@pytest.mark.parametrize("name", [name for name in CACHES if STOCK[name].masks])
@torch.no_grad()
def test_attention_of_an_answer_equals_eager_attention(name, mllm):
    read = mllm(name)
    images = pictures(name, 1)
    by_layer = read.answer_attention(
        read.preprocess(images), "hello", "hellohello", average_heads=False
    )
    weights = torch.cat([*by_layer.values()])
    (answer,) = read.chat.answer_ids(["hellohello"])
    ids, is_image = asked_ids(name, [HELLO], answer)
    eager = copy.deepcopy(read.model)
    eager.set_attn_implementation("eager")
    inputs = stock_inputs(name, images=images, ids=ids, answer=len(answer))
    output = eager(use_cache=False, output_attentions=True, **inputs)
    asking = slice(len(ids) - len(answer) - 1, -1)
    expected = torch.cat(output.attentions)[:, :, asking][..., is_image]
    assert_near(weights, expected, DEPTH)
    assert (weights.sum(-1) > 0).any()


def test_tokens_are_reported_while_the_answer_grows_and_a_stop_leaves_no_hooks(mllm):
    read = mllm("llava")
    asked = pictures("llava", 1)[0], "hello"
    change = interventions("llava", 1)[0]
    plain = read.answer(*asked, max_new_tokens=4)
    shown = []
    whole = read.answer(*asked, **change, max_new_tokens=4, on_token=shown.append)
    assert whole == shown[-1]
    assert shown == [read.answer(*asked, **change, max_new_tokens=n + 1) for n in range(len(shown))]
    assert len(shown) > 1

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read.answer(*asked, **change, max_new_tokens=4, on_token=stop)
    assert read.answer(*asked, max_new_tokens=4) == plain
