"""`probes plant`: edit a model of the toy world so that it is known what a study must find in it.

    recovery    adapter and LLM are trained by a cross-entropy on their own image tokens, the class of each patch. Where
                look-alikes need other patches, the LLM's layers then read better than the adapter.
    drop        the adapter loses the directions that tell pairs of classes apart, so that probes read less from it
    random      the entries of each matrix of the LLM's layers are shuffled, so that nothing that it does is learned

The result is an ordinary checkpoint. Its training.json records what was `planted`, and the `truth` of claims by folder
of pictures, which reports show beside the verdicts.

Shapes: B batch, N tokens, T = 64 image tokens, K classes, d width of the encoder.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaProcessor

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import read_training
from llava_bidir.data.collate import pad
from llava_bidir.data.conversation import IGNORE_INDEX, encode
from llava_bidir.model.export import export_hf
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration
from probes.config import PlantOptions
from probes.models.hooks import at_input
from probes.models.random_weights import permute_weights

from .binding import GRID
from .canvas import CLASSES
from .dialogues import SceneText, build_dialogue, patch_shares, prepend_picture
from .tiny_models import normalize, train

# Pairs of classes that a planted drop merges, in this order. None of them are look-alikes.
MERGED = (("lamp", "tree"), ("picture", "window"), ("door", "person"))
NUMBERS = ("no", "one", "two", "three")  # of pairs, in names
# Claims whose truth follows from how the LLM was made: a causal model cannot refine tokens before the cue of their
# scene, the bidirectional one that it is compared with can.
CLAIMS = ("recovery", "starvation", "starvation_first_row")


def plant_recovery(
    model: Path, world: Path, out: Path, *, steps: int, answer_steps: int = 0, seed: int = 0
) -> list[float]:
    """Train adapter and LLM on the class of each patch, which a linear head reads off the image tokens.

    The head reads them after three quarters of the layers, so that the last ones can fetch what they tell; it is then
    dropped.

    Args:
        model: Checkpoint of `llava-bidir fit` on the toy world.
        world: Folder of `demo-assets`; the pictures of its conversations are used.
        out: Checkpoint to write.
        steps: Optimizer steps on pictures alone. With no steps at all, a copy is written.
        answer_steps: Further steps, in which questions about single patches are trained, too.
        seed: Seed of batches, questions and head.

    Returns:
        The loss on image tokens of each step.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net, processor = _load(model)
    pixels, labels = read_pictures(world / "llava", "training")
    decoder = net.model.language_model
    head = nn.Linear(decoder.config.hidden_size, len(CLASSES))
    depth = len(decoder.layers) * 3 // 4
    weights = [*head.parameters(), *_trained_weights(net)]
    losses: list[float] = []

    def loss(batch: int, questions: int) -> Tensor:
        chosen = rng.integers(len(pixels), size=batch)
        of_batch = pixels[chosen], labels[chosen]
        states, of_answers = _forward(net, processor, *of_batch, questions, depth, rng)
        on_image = F.cross_entropy(
            head(states).flatten(0, 1), labels[chosen].flatten(), ignore_index=IGNORE_INDEX
        )
        losses.append(on_image.item())
        return on_image + of_answers

    net.train()
    if steps:
        # the others have no gradient
        layers = decoder.layers
        decoder.layers = decoder.layers[:depth]
        train(weights, loss=lambda: loss(32, questions=0), steps=steps, name="image tokens' LLM")
        decoder.layers = layers
    if answer_steps:
        train(weights, loss=lambda: loss(20, questions=8), steps=answer_steps, name="answering LLM")
    record = {
        "planted": "recovery",
        "layer": depth,
        "steps": steps,
        "answer_steps": answer_steps,
        "seed": seed,
    }
    truth = dict.fromkeys(CLAIMS, "planted" if losses else "absent")
    _save(net.eval(), processor=processor, source=model, out=out, record=record, truth=truth)
    return losses


def plant_random(
    model: Path,
    out: Path,
    *,
    weights: str = "shuffled",
    edit: Callable[[nn.ModuleList], None] = permute_weights,
    seed: int = 0,
) -> None:
    """Replace the weights of the LLM's layers, by `edit` in place, so that nothing is learned; `weights` names them."""
    net, processor = _load(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        edit(net.model.language_model.layers)
    record = {"planted": "random", "seed": seed, "weights": weights}
    _save(
        net,
        processor=processor,
        source=model,
        out=out,
        record=record,
        truth=dict.fromkeys(CLAIMS, "absent"),
    )


def name_model(planted: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what reports call a model: "name", of at most 16 characters if one thing was planted, and "about".

    Args:
        planted: What was planted in it, as training.json records it. A recovery is trained, and so has no words.
    """
    names = []
    words = []
    for record in planted:
        if record["planted"] == "random":
            shuffled = record["weights"] == "shuffled"
            names.append("LLM shuffled" if shuffled else "LLM drawn anew")
            words.append("LLM shuffled" if shuffled else f"LLM drawn anew ({record['weights']})")
        if record["planted"] == "drop":
            pairs = len(record["merged"])
            names.append("adapter merged" if pairs else "adapter intact")
            words.append(f"adapter merges {NUMBERS[pairs]} pair{'s' * (pairs != 1)} of classes")
    return {"name": ", ".join(names) or "trained", "about": ", ".join(words) or "as trained"}


def plant_drop(model: Path, world: Path, out: Path, *, pairs: int) -> None:
    """Take the directions that tell `pairs` pairs of classes apart out of the adapter's first layer.

    The means of both classes of a pair are then the same in the adapter, so that no linear probe of its input can tell
    them apart better than by their frequency. 0 pairs write a copy.
    """
    net, processor = _load(model)
    if pairs:
        pixels, labels = read_pictures(world / "segmentation", "training")
        directions = class_directions(encoder_states(net, pixels), labels, MERGED[:pairs])
        basis = torch.linalg.qr(directions.T)[0]
        first = net.model.multi_modal_projector.linear_1.weight
        with torch.no_grad():
            first -= first @ basis @ basis.T
    truth = {"adapter_drop": "planted" if pairs else "absent"}
    record = {"planted": "drop", "merged": MERGED[:pairs]}
    _save(net, processor=processor, source=model, out=out, record=record, truth=truth)


def read_pictures(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return the normalised pixels f[n, 3, H, W] and the majority class of each patch i64[n, T] of a split."""
    files = sorted((folder / "images" / split).glob("*.png"))
    if not files:
        raise UserError(
            f"{folder}/images/{split} holds no pictures; expected the folder of `probes demo-assets`"
        )

    def read(file):
        return np.asarray(Image.open(file))

    shares = [patch_shares(read(folder / "annotations" / split / file.name)) for file in files]
    labels = [np.where(share.any(1), share.argmax(1), IGNORE_INDEX) for share in shares]
    return normalize(np.stack([read(file) for file in files])), torch.from_numpy(np.stack(labels))


@torch.no_grad()
def encoder_states(net: LlavaBidirForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the adapter's input f[n, T, d]."""
    states: list[Tensor] = []
    with at_input(net.model.multi_modal_projector, states.append):
        for part in pixels.split(50):
            net.model.get_image_features(pixel_values=part)
    return torch.cat([s.reshape(-1, GRID**2, s.shape[-1]) for s in states])


def class_directions(states: Tensor, labels: Tensor, pairs: tuple[tuple[str, str], ...]) -> Tensor:
    """Return the difference of the mean states of each pair of classes, f[pairs, d]."""

    def mean(name):
        return states[labels == CLASSES.index(name)].mean(0)

    return torch.stack([mean(a) - mean(b) for a, b in pairs])


def _forward(
    net: LlavaBidirForConditionalGeneration,
    processor: LlavaProcessor,
    pixels: Tensor,
    labels: Tensor,
    questions: int,
    depth: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor | float]:
    """Return the states of the image tokens after layer `depth`, normed, f[B, T, width], and the loss on answers."""
    image_id = net.config.image_token_id
    rows = [
        _encode_picture(processor, image_id=image_id, labels=picture, questions=questions, rng=rng)
        for picture in labels
    ]
    ids = pad([row[0] for row in rows], 0)
    mask = pad([[1] * len(row[0]) for row in rows], 0)
    targets = pad([row[1] for row in rows], IGNORE_INDEX) if questions else None
    result = net(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=targets, output_hidden_states=True,
        logits_to_keep=0 if questions else 1,
    )  # fmt: skip
    states = result.hidden_states[depth]
    if len(result.hidden_states) > depth + 1:  # else transformers has normed the last ones
        states = net.model.language_model.norm(states)
    states = states[ids == image_id].unflatten(0, (len(ids), GRID**2))
    return states, result.loss if questions else 0.0


def _encode_picture(
    processor: LlavaProcessor,
    image_id: int,
    labels: Tensor,
    questions: int,
    rng: np.random.Generator,
) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a picture with questions about random patches; without, up to the image's end."""
    text = SceneText([CLASSES[max(k, 0)] for k in labels.tolist()], "")
    turns = build_dialogue(text, rng, points=max(1, questions))
    turns = prepend_picture(turns)
    ids, targets = encode(
        turns,
        tokenizer=processor.tokenizer,
        template="vicuna_v1",
        image_tokens=GRID**2,
        image_token_id=image_id,
    )
    end = len(ids) if questions else len(ids) - ids[::-1].index(image_id)
    return ids[:end], targets[:end]


def _load(model: Path) -> tuple[LlavaBidirForConditionalGeneration, LlavaProcessor]:
    net = LlavaBidirForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    net.requires_grad_(False)
    for weight in _trained_weights(net):
        weight.requires_grad_(True)
    return net, LlavaProcessor.from_pretrained(model)


def _trained_weights(net: LlavaBidirForConditionalGeneration) -> list[nn.Parameter]:
    parts = net.model.multi_modal_projector, net.model.language_model, net.lm_head
    return [weight for part in parts for weight in part.parameters()]


def _save(
    net: LlavaBidirForConditionalGeneration,
    processor: LlavaProcessor,
    source: Path,
    out: Path,
    record: dict[str, Any],
    truth: dict[str, str],
) -> None:
    """Write the checkpoint with the truth of claims; what was planted in its source stays true."""
    training = read_training(source)
    before = training.get("truth", {}).get("segmentation", {})
    training["planted"] = [*training.get("planted", []), record]
    training["truth"] = {"segmentation": before | truth}
    training |= name_model(training["planted"])
    export_hf(net, processor=processor, out=out, training=training)


def run(options: PlantOptions) -> None:
    """Run `probes plant`."""
    if options.what == "drop":
        plant_drop(options.model, options.world, options.out, pairs=options.pairs)
    elif options.what == "random":
        plant_random(options.model, options.out, seed=options.seed)
    else:
        plant_recovery(
            options.model,
            options.world,
            options.out,
            steps=options.steps,
            answer_steps=options.answer_steps,
            seed=options.seed,
        )
    print(f"wrote {options.out}")
