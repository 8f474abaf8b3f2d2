"""Answers of every family on a tiny random model, against the stock model's own generation and forward.

The stock model has masks and replaced states written out. Ids, masks and inputs come from `tiny_families`, positions
from the stock forward. Nothing is cached.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import pytest
import tiny_families
import torch
from PIL import Image
from tiny_families import (
    IMAGE_ID,
    SEVERAL_WAYS_IN,
    STOCK,
    WORDS,
    asked_ids,
    pictures,
)
from tolerances import rounding
from torch import Tensor, nn

import probes
from probes import Knockout

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("small_squares")]

Cut = Callable[[dict[str, Tensor]], Tensor]

# LLaVA-NeXT's and OneVision's stock forward wants tiles; LLMs and features are those of other families
ALL = sorted({*STOCK} - {"llava_next", "llava_onevision"})
MASKABLE = [name for name in ALL if STOCK[name].masks]
# one family of each kind of cache, mask and positions
CACHES = """
llava gemma3 gemma4 gemma4_unified paligemma mistral3 qwen2_vl qwen3_vl qwen3_5 kimi_k25 lfm2_vl exaone4_5
""".split()
DEPTH = 3 + 3 + 1  # encoder and adapter, layers, word head
EOS = 2


@dataclass(frozen=True)
class Change:
    """A knockout and replaced states, by what they are.

    Args:
        cut: (tokens by name) -> bool[N, N], pairs to cut; tokens are bool[N].
        layers: Layers 1..L that are cut, None for all.
        hooks: Functions of the image's states by layer 0..L - 1, after which they apply.
    """

    cut: Cut | None = None
    layers: tuple[int, ...] | None = None
    hooks: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class StockModel:
    """A stock model that is asked about images by its own forward."""

    name: str
    model: nn.Module
    images: Sequence[Image.Image]

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(STOCK[self.name].decoder).layers

    def inputs(self, ids: Tensor, answer: int = 0) -> dict:
        """Return the arguments of the forward; the last `answer` of the ids long[N] are an answer."""
        count = len(self.images)
        stock = STOCK[self.name]
        arguments = {
            "input_ids": ids.expand(count, -1),
            **stock.inputs(list(self.images)),
        }
        if stock.types:
            key, of_image, of_text = stock.types
            types = torch.where(ids == IMAGE_ID, of_image, of_text)
            if stock.native == "prefix":  # of the question, too
                types = torch.full_like(ids, of_image)
                types[len(ids) - answer :] = of_text
            arguments[key] = types.expand(count, -1)
        return arguments

    def masks(self, sets: dict[str, Tensor], change: Change) -> list[Tensor]:
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
            if change.cut and (change.layers is None or number in change.layers):
                allowed = allowed & ~change.cut(sets)
            masks.append(torch.where(allowed, 0.0, -torch.inf)[:, None])
        return masks

    def logits(
        self,
        ids: Tensor,
        answer: int,
        change: Change | None = None,
        **options,
    ):
        """Return the output of the forward for ids long[N] with an answer at their end."""
        place = torch.arange(len(ids))
        image = ids == IMAGE_ID
        first, *_, last = place[image].tolist()
        end = len(ids) - answer  # the last token of the prompt is the template's
        sets = {
            "image": image,
            "prefix": place < first,
            "question": (place > last) & (place < end - 1),
            "last": place == end - 1,
            "answer": place >= end,
        }
        with ExitStack() as stack:
            if change and STOCK[self.name].masks:
                masks = self.masks(sets, change)
                for layer, mask in zip(self.layers, masks, strict=True):

                    def use(
                        _,
                        args,
                        kwargs,
                        mask=mask,
                    ):
                        return args, kwargs | {"attention_mask": mask}

                    handle = layer.self_attn.register_forward_pre_hook(use, with_kwargs=True)
                    stack.callback(handle.remove)
            for number, function in change.hooks.items() if change else ():
                stack.callback(self._replace(number, function, image).remove)
            return self.model(use_cache=False, **self.inputs(ids, answer), **options)

    def _replace(self, number: int, function: Callable[[Tensor], Tensor], image: Tensor):
        """Register a hook that replaces the image's states after a layer, or before the first one for 0."""

        def before(_, args, kwargs):
            states = (args[0] if args else kwargs.pop("hidden_states")).clone()
            states[:, image] = function(states[:, image])
            return (states, *args[1:]), kwargs

        return self.layers[number].register_forward_pre_hook(before, with_kwargs=True)

    @torch.no_grad()
    def score(
        self,
        question: list[int],
        answer: list[int],
        change: Change | None = None,
    ) -> Tensor:
        """Return the log-probability of an answer about each image, f[B]."""
        ids, _ = asked_ids(self.name, question, answer)
        logits = self.logits(ids, len(answer), change).logits[:, -len(answer) - 1 : -1]
        return logits.log_softmax(-1)[:, range(len(answer)), answer].sum(1)

    @torch.no_grad()
    def generate(self, question: list[int], tokens: int) -> list[str]:
        """Return the answer of the model's own generation about each image, without the end token."""
        ids, _ = asked_ids(self.name, question)
        found = self.model.generate(**self.inputs(ids), do_sample=False, max_new_tokens=tokens)
        rows = [[*row, EOS] for row in found[:, len(ids) :].tolist()]
        return [spoken(row[: row.index(EOS)]) for row in rows]

    @torch.no_grad()
    def attention(self, question: list[int], answer: list[int]) -> Tensor:
        """Return the weights with which an answer to a question about one image is predicted, f[L, A, n, T].

        They are those of eager attention to the image's tokens.
        """
        model = copy.deepcopy(self.model)
        model.set_attn_implementation("eager")
        ids, is_image = asked_ids(self.name, question, answer)
        eager = StockModel(self.name, model, self.images)
        output = eager.logits(ids, len(answer), output_attentions=True)
        first = len(ids) - len(answer) - 1
        return torch.cat(output.attentions)[:, :, first:-1][..., is_image]

    @torch.no_grad()
    def generate_uncached(
        self,
        question: list[int],
        tokens: int,
        change: Change,
    ) -> str:
        """Return the greedy answer about one image by complete forwards."""
        answer = []
        while len(answer) < tokens:
            ids, _ = asked_ids(self.name, question, answer)
            token = int(self.logits(ids, len(answer), change).logits[0, -1].argmax())
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


def pairs(rows: tuple[str, ...], columns: tuple[str, ...]) -> Cut:
    """Return a function of the pairs of named tokens, bool[N, N]."""

    def cut(sets):
        queries = sum(sets[name] for name in rows) > 0
        keys = sum(sets[name] for name in columns) > 0
        return queries[:, None] & keys

    return cut


def blocked_tokens(name: str, images: int) -> Tensor:
    """Other tokens of each image, bool[B, T]; never the first one, which may be all that a token sees."""
    place = torch.arange(STOCK[name].grid[0] * STOCK[name].grid[1])
    return torch.stack([(place > 0) & ((place + image) % 3 == 1) for image in range(images)])


def cut_blocked(blocked: Tensor) -> Cut:
    """Return a function of the pairs of Eq. 1, bool[B, N, N]."""

    def cut(sets):
        image = sets["image"]
        keys = torch.zeros(len(blocked), len(image), dtype=torch.bool)
        keys[:, image] = blocked
        return image[:, None] & keys[:, None]

    return cut


def interventions(name: str, images: int) -> dict[str, tuple[dict, Change]]:
    """Return keywords of the package and what they mean, by a name, of those that a family can take."""
    blocked = blocked_tokens(name, images)
    text = ("question", "last", "answer")
    to_image = {"knockout": Knockout(layers=[1, 3], rows=text, columns="image")}
    cut_image = pairs(text, ("image",))
    hooks = {
        "hooks": {
            "adapter": lambda states: states.flip(1),
            "layer_02": lambda states: states * 0.5,
        }
    }
    by_layer = {0: hooks["hooks"]["adapter"], 2: hooks["hooks"]["layer_02"]}
    found = {"none": ({}, Change())}
    if STOCK[name].masks:
        found |= {
            "Eq. 1": (
                {"knockout": Knockout(blocked)},
                Change(cut_blocked(blocked)),
            ),
            "text to image": (to_image, Change(cut_image, (1, 3))),
            "last to question": (
                {"knockout": Knockout(rows="last", columns="question")},
                Change(pairs(("last",), ("question",))),
            ),
        }
    if STOCK[name].native == "prefix":
        found["image to question"] = (
            {"knockout": Knockout(rows="image", columns="question")},
            Change(pairs(("image",), ("question",))),
        )
    if name not in SEVERAL_WAYS_IN:
        found["patched"] = (hooks, Change(hooks=by_layer))
        if STOCK[name].masks:
            found["both"] = (to_image | hooks, Change(cut_image, (1, 3), by_layer))
    return found


@pytest.fixture
def mllm(load_family, monkeypatch):
    def load(name: str):
        read = load_family(name)
        monkeypatch.setattr(read.chat.tokenizer, "decode", lambda ids, **_: spoken(ids))
        return read

    return load


def check_answers(name: str, read) -> None:
    """Compare greedy answers with the stock model's own generation, with its cache and positions for two images."""
    images = pictures(name)
    for text, question in QUESTIONS.items():
        ids, _ = asked_ids(name, question)
        assert [
            *read.ids[0].tolist(),
            *read.chat.question_ids(text),
        ] == ids.tolist()
    answers = read.answer(images, text, max_new_tokens=4)
    assert answers == StockModel(name, read.model, images).generate(question, 4)
    assert any(answers), "nothing is compared with nothing"


def check_scores(name: str, read) -> None:
    """Compare scores of two images, as they are and under knockouts and hooks."""
    images = pictures(name)
    pixels = read.preprocess(images)
    stock = StockModel(name, read.model, images)
    answers = read.chat.answer_ids(ANSWERS)
    scores = {}
    for kind, (arguments, change) in interventions(name, len(images)).items():
        scores[kind] = read.answer_log_probs(pixels, "hello", ANSWERS, **arguments)
        for column, answer in enumerate(answers):
            expected = stock.score([HELLO], answer, change)
            found = scores[kind][:, column]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            if kind == "none":  # the written masks are the model's own
                own = stock.score([HELLO], answer)
                torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
    for kind in scores.keys() - {"none"}:
        assert (scores[kind] - scores["none"]).abs().amax(1).min() > 1e-4, f"{kind} does nothing"


@pytest.mark.parametrize("name", ALL)
def test_greedy_answers_equal_the_stock_models_generation(name, mllm):
    check_answers(name, mllm(name))


@pytest.mark.parametrize("name", ALL)
def test_scores_equal_the_stock_forward_with_masks_and_states_written_out(name, mllm):
    check_scores(name, mllm(name))


def test_answers_of_a_soft_capped_llm_that_runs_eagerly(tmp_path, monkeypatch):
    """PaliGemma 2: transformers has no sdpa for Gemma 2, so that masks are added to its scores."""
    text = {
        "model_type": "gemma2",
        **tiny_families.LLM,
        "attn_logit_softcapping": 2.0,
    }
    config = STOCK["paligemma"].config | {"text_config": text}
    monkeypatch.setitem(STOCK, "paligemma", replace(STOCK["paligemma"], config=config))
    read = probes.load(str(tiny_families.write("paligemma", tmp_path, "eager")))
    read.chat.tokenizer.decode = lambda ids, **_: spoken(ids)
    check_answers("paligemma", read)
    check_scores("paligemma", read)


@pytest.mark.parametrize("name", CACHES)
def test_cached_answers_equal_uncached_ones(name, mllm):
    read = mllm(name)
    images = pictures(name, 1)
    stock = StockModel(name, read.model, images)
    possible = interventions(name, 1)
    answers = []
    with never_generated(read, IMAGE_ID):
        for kind in possible.keys() & {
            "Eq. 1",
            "last to question",
            "patched",
            "both",
        }:
            arguments, change = possible[kind]
            answers.append(read.answer(images[0], "hello", max_new_tokens=4, **arguments))
            assert answers[-1] == stock.generate_uncached([HELLO], 4, change), kind
    assert any(answers)


@contextmanager
def never_generated(read, token: int):
    """Set a token's logit to 0: an uncached forward would take a placeholder for a part of the image."""
    row = read.model.get_output_embeddings().weight.data[token]
    kept = row.clone()
    row.zero_()
    try:
        yield
    finally:
        row.copy_(kept)


@pytest.mark.parametrize("name", MASKABLE)
def test_attention_of_an_answer_equals_eager_attention(name, mllm):
    read = mllm(name)
    images = pictures(name, 1)
    by_layer = read.answer_attention(
        read.preprocess(images), "hello", "hellohello", average_heads=False
    )
    weights = torch.cat([*by_layer.values()])
    (answer,) = read.chat.answer_ids(["hellohello"])
    expected = StockModel(name, read.model, images).attention([HELLO], answer)
    torch.testing.assert_close(weights, expected, **rounding(expected, DEPTH))
    assert (weights.sum(-1) > 0).any()


def test_tokens_are_reported_while_the_answer_grows_and_a_stop_leaves_no_hooks(
    mllm,
):
    read = mllm("llava")
    image = pictures("llava", 1)[0]
    asked = image, "hello", Knockout(blocked_tokens("llava", 1))
    plain = read.answer(*asked[:2], max_new_tokens=4)
    shown = []
    assert read.answer(*asked, 4, on_token=shown.append) == shown[-1]
    assert shown == [read.answer(*asked, n) for n in range(1, len(shown) + 1)]
    assert len(shown) > 1

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read.answer(*asked, 4, on_token=stop)
    assert read.answer(*asked[:2], max_new_tokens=4) == plain
