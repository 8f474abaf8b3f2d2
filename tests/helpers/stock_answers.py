"""Answers of stock models in their own forward, with masks and replaced states written out, for any family.

Ids, masks and inputs come from `tiny_families`, positions from the stock forward. Nothing is cached.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from PIL import Image
from tiny_families import IMAGE_ID, STOCK, asked_ids
from torch import Tensor, nn

FULL_VIEW_ONLY = ("llava_next", "llava_onevision")  # no tiles: its inputs are embedded here
EOS = 2


@dataclass(frozen=True)
class Change:
    """A knockout and replaced states, by what they are.

    Args:
        cut: (query, key, tokens by name) -> bool[N, N], pairs to cut; tokens are bool[N].
        layers: Layers 1..L that are cut, None for all.
        hooks: Functions of the image's states by layer 0..L, 0 for the input of the first layer.
    """

    cut: Callable[[dict[str, Tensor]], Tensor] | None = None
    layers: tuple[int, ...] | None = None
    hooks: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class StockModel:
    """A stock model that is asked about images by its own forward."""

    name: str
    model: nn.Module
    images: Sequence[Image.Image]

    @property
    def config(self):
        return self.model.config.get_text_config()

    @property
    def layers(self) -> nn.ModuleList:
        path = STOCK[self.name].decoder.split(".")
        module = self.model
        for part in path:
            module = getattr(module, part)
        return module.layers

    def inputs(self, ids: Tensor, answer: int = 0) -> dict:
        """Return the arguments of the forward; the last `answer` of the ids long[N] are an answer."""
        count = len(self.images)
        stock = STOCK[self.name]
        batch = ids.expand(count, -1)
        if self.name in FULL_VIEW_ONLY:
            return {"inputs_embeds": self._embed(batch)}
        arguments = {"input_ids": batch, **stock.inputs(list(self.images))}
        if stock.types:
            key, of_image, of_text = stock.types
            types = torch.where(ids == IMAGE_ID, of_image, of_text)
            if stock.native == "prefix":  # of the question, too
                types = torch.full_like(ids, of_image)
                types[len(ids) - answer :] = of_text
            arguments[key] = types.expand(count, -1)
        return arguments

    def _embed(self, ids: Tensor) -> Tensor:
        """Return embeddings of text and of the full view by encoder and adapter of the stock model."""
        inner = self.model.model
        pixels = STOCK[self.name].inputs(list(self.images))["pixel_values"][:, 0]
        config = self.model.config
        states = inner.vision_tower(pixels, output_hidden_states=True).hidden_states
        chosen = states[config.vision_feature_layer]
        if config.vision_feature_select_strategy == "default":
            chosen = chosen[:, 1:]
        features = inner.multi_modal_projector(chosen)
        embedded = self.model.get_input_embeddings()(ids)
        return embedded.masked_scatter((ids == IMAGE_ID)[..., None], features)

    def masks(
        self,
        ids: Tensor,
        sets: dict[str, Tensor],
        answer: int,
        change: Change,
    ) -> list[Tensor]:
        """Return one additive mask per layer, f[B, 1, N, N]: 0 where a query may attend, else -inf."""
        length = len(ids)
        query = torch.arange(length)[:, None]
        key = torch.arange(length)[None]
        native = STOCK[self.name].native
        image = ids == IMAGE_ID
        kinds = getattr(self.config, "layer_types", None) or ["full_attention"] * len(self.layers)
        masks = []
        for number, kind in enumerate(kinds, 1):
            allowed = key <= query
            sliding = kind == "sliding_attention"
            if native == "bidirectional" or (native == "bidirectional_sliding" and sliding):
                allowed = allowed | (image[:, None] & image[None])
            elif native == "prefix":
                allowed = allowed | ((query < length - answer) & (key < length - answer))
            if sliding:  # among image tokens, too
                allowed = allowed & (query - key < self.config.sliding_window)
            allowed = allowed.expand(len(self.images), -1, -1)
            if change.cut and (change.layers is None or number in change.layers):
                allowed = allowed & ~change.cut(sets)
            mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
            masks.append(mask[:, None])
        return masks

    def logits(
        self,
        ids: Tensor,
        answer: int,
        change: Change | None = None,
        **options,
    ):
        """Return the output of the forward for ids long[N] with an answer at their end."""
        sets = {"image": ids == IMAGE_ID}
        after = len(STOCK[self.name].after_question)
        assert after == 1, "the last token of the prompt is the template's"
        place = torch.arange(len(ids))
        first_text = int((ids == IMAGE_ID).nonzero().max()) + 1
        end = len(ids) - answer
        sets["prefix"] = place < int((ids == IMAGE_ID).nonzero().min())
        sets["question"] = (place >= first_text) & (place < end - 1)
        sets["last"] = place == end - 1
        sets["answer"] = place >= end
        with ExitStack() as stack:
            if change is not None:
                if STOCK[self.name].masks:
                    masks = self.masks(ids, sets, answer, change)
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
                for number, function in change.hooks.items():
                    stack.callback(self._replace(number, function, sets["image"]).remove)
            return self.model(use_cache=False, **self.inputs(ids, answer), **options)

    def _replace(self, number: int, function: Callable[[Tensor], Tensor], image: Tensor):
        """Register a hook that replaces the image's states after a layer, or before the first one for 0."""

        def changed(states: Tensor) -> Tensor:
            states = states.clone()
            states[:, image] = function(states[:, image])
            return states

        def before(_, args, kwargs):
            if args:
                return (changed(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": changed(kwargs["hidden_states"])}

        def after(_, args, output):
            if isinstance(output, tuple):
                return (changed(output[0]), *output[1:])
            return changed(output)

        if number == 0:
            return self.layers[0].register_forward_pre_hook(before, with_kwargs=True)
        return self.layers[number - 1].register_forward_hook(after)

    @torch.no_grad()
    def score(
        self,
        question: list[int],
        answer: list[int],
        change: Change | None = None,
    ) -> Tensor:
        """Return the log-probability of an answer about each image, f[B]."""
        ids, _ = asked_ids(self.name, question, answer)
        logits = self.logits(ids, len(answer), change).logits
        log_probs = logits[:, -len(answer) - 1 : -1].log_softmax(-1)
        return log_probs.gather(-1, torch.tensor(answer).expand(len(logits), -1)[..., None]).sum(
            (1, 2)
        )

    @torch.no_grad()
    def generate(self, question: list[int], tokens: int) -> list[list[int]]:
        """Return the answer of the model's own generation about each image, without the end token."""
        ids, _ = asked_ids(self.name, question)
        inputs = self.inputs(ids)
        found = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        prompt = len(ids) if "input_ids" in inputs else 0
        return [until_end(row) for row in found[:, prompt:].tolist()]

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
    ) -> list[int]:
        """Return the greedy answer about one image by complete forwards."""
        answer = []
        while len(answer) < tokens:
            ids, _ = asked_ids(self.name, question, answer)
            token = int(self.logits(ids, len(answer), change).logits[0, -1].argmax())
            if token == EOS:
                break
            answer.append(token)
        return answer


def until_end(tokens: list[int]) -> list[int]:
    """Return the tokens before the first end token."""
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens
