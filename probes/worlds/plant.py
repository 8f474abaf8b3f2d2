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

from .binding import PATCH_COUNT
from .canvas import CLASSES
from .dialogues import SceneText, build_dialogue, patch_shares, prepend_picture
from .tiny_models import normalize, train

# Pairs of classes that a planted drop merges, in this order. None of them are look-alikes.
MERGED = (("lamp", "tree"), ("picture", "window"), ("door", "person"))
COUNTED_PAIRS = ("no pairs", "one pair", "two pairs", "three pairs")
# Claims whose truth follows from how the LLM was made: a causal model cannot refine tokens before the cue of their
# scene, the bidirectional one that it is compared with can.
CLAIMS = ("recovery", "starvation", "starvation_first_row")


def run(options: PlantOptions) -> None:
    """Run `probes plant`."""
    model = options.model
    out = options.out
    if options.what == "drop":
        plant_drop(model, options.world, out, pairs=options.pairs)
    elif options.what == "random":
        plant_random(model, out, seed=options.seed)
    else:
        plant_recovery(
            model,
            options.world,
            out,
            steps=options.steps,
            answer_steps=options.answer_steps,
            seed=options.seed,
        )
    print(f"wrote {out}")


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
        targets = labels[chosen]
        states, loss_on_answers = _forward(
            net, processor, pixels[chosen], targets, questions=questions, depth=depth, rng=rng
        )
        logits = head(states).flatten(0, 1)
        loss_on_image = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX)
        losses.append(loss_on_image.item())
        return loss_on_image + loss_on_answers

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
    net.eval()
    _save(net, processor, source=model, out=out, record=record, claims=CLAIMS, is_true=bool(losses))
    return losses


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
    sequences = []
    targets = []
    for labels_of_picture in labels:
        ids_of_picture, targets_of_picture = _encode_picture(
            processor, image_id=image_id, labels=labels_of_picture, questions=questions, rng=rng
        )
        sequences.append(ids_of_picture)
        targets.append(targets_of_picture)
    ids = pad(sequences, 0)
    inputs = {
        "input_ids": ids,
        "attention_mask": pad([[1] * len(sequence) for sequence in sequences], 0),
        "pixel_values": pixels,
        "logits_to_keep": 1,
    }
    if questions:
        inputs |= {"labels": pad(targets, IGNORE_INDEX), "logits_to_keep": 0}
    result = net(**inputs, output_hidden_states=True)
    states = result.hidden_states[depth]
    if len(result.hidden_states) > depth + 1:  # else transformers has normed the last ones
        states = net.model.language_model.norm(states)
    states = states[ids == image_id].unflatten(0, (len(ids), PATCH_COUNT))
    if questions:
        return states, result.loss
    return states, 0.0


def _encode_picture(
    processor: LlavaProcessor,
    image_id: int,
    labels: Tensor,
    questions: int,
    rng: np.random.Generator,
) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a picture with questions about random patches; without, up to the image's end."""
    names = [CLASSES[max(k, 0)] for k in labels.tolist()]
    turns = build_dialogue(SceneText(names, ""), rng, points=max(1, questions))
    ids, targets = encode(
        prepend_picture(turns),
        tokenizer=processor.tokenizer,
        template="vicuna_v1",
        image_tokens=PATCH_COUNT,
        image_token_id=image_id,
    )
    end = len(ids)
    if not questions:
        end -= ids[::-1].index(image_id)
    return ids[:end], targets[:end]


def plant_drop(model: Path, world: Path, out: Path, *, pairs: int) -> None:
    """Take the directions that tell `pairs` pairs of classes apart out of the adapter's first layer.

    The means of both classes of a pair are then the same in the adapter, so that no linear probe of its input can tell
    them apart better than by their frequency. 0 pairs write a copy.
    """
    net, processor = _load(model)
    if pairs:
        pixels, labels = read_pictures(world / "segmentation", "training")
        states = encoder_states(net, pixels)
        directions = class_directions(states, labels, MERGED[:pairs])
        basis = torch.linalg.qr(directions.T)[0]
        first = net.model.multi_modal_projector.linear_1.weight
        with torch.no_grad():
            first -= first @ basis @ basis.T
    record = {"planted": "drop", "merged": MERGED[:pairs]}
    _save(
        net,
        processor,
        source=model,
        out=out,
        record=record,
        claims=["adapter_drop"],
        is_true=pairs > 0,
    )


@torch.no_grad()
def encoder_states(net: LlavaBidirForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the adapter's input f[n, T, d]."""
    states: list[Tensor] = []
    with at_input(net.model.multi_modal_projector, states.append):
        for batch in pixels.split(50):
            net.model.get_image_features(pixel_values=batch)
    width = states[0].shape[-1]
    return torch.cat([of_batch.reshape(-1, PATCH_COUNT, width) for of_batch in states])


def class_directions(states: Tensor, labels: Tensor, pairs: tuple[tuple[str, str], ...]) -> Tensor:
    """Return the difference of the mean states of each pair of classes, f[pairs, d]."""

    def mean(name):
        of_class = labels == CLASSES.index(name)
        return states[of_class].mean(0)

    return torch.stack([mean(first) - mean(second) for first, second in pairs])


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
    _save(net, processor, source=model, out=out, record=record, claims=CLAIMS, is_true=False)


def read_pictures(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return the normalised pixels f[n, 3, H, W] and the majority class of each patch i64[n, T] of a split."""
    files = sorted((folder / "images" / split).glob("*.png"))
    if not files:
        raise UserError(
            f"{folder}/images/{split} holds no pictures; expected the folder of `probes demo-assets`"
        )

    images = []
    labels = []
    for file in files:
        images.append(np.asarray(Image.open(file)))
        mask = np.asarray(Image.open(folder / "annotations" / split / file.name))
        shares = patch_shares(mask)
        majority = np.where(shares.any(1), shares.argmax(1), IGNORE_INDEX)
        labels.append(majority)
    return normalize(np.stack(images)), torch.from_numpy(np.stack(labels))


def _load(model: Path) -> tuple[LlavaBidirForConditionalGeneration, LlavaProcessor]:
    net = LlavaBidirForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    net.requires_grad_(False)
    for weight in _trained_weights(net):
        weight.requires_grad_(True)
    return net, LlavaProcessor.from_pretrained(model)


def _trained_weights(net: LlavaBidirForConditionalGeneration) -> list[nn.Parameter]:
    return [
        *net.model.multi_modal_projector.parameters(),
        *net.model.language_model.parameters(),
        *net.lm_head.parameters(),
    ]


def _save(
    net: LlavaBidirForConditionalGeneration,
    processor: LlavaProcessor,
    source: Path,
    out: Path,
    record: dict[str, Any],
    claims: Sequence[str],
    is_true: bool,
) -> None:
    """Write the checkpoint with the truth of claims; what was planted in its source stays true."""
    training = read_training(source)
    before = training.get("truth", {}).get("segmentation", {})
    training["planted"] = [*training.get("planted", []), record]
    truth = "absent"
    if is_true:
        truth = "planted"
    training["truth"] = {"segmentation": before | dict.fromkeys(claims, truth)}
    training |= name_model(training["planted"])
    export_hf(net, processor=processor, out=out, training=training)


def name_model(planted: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what reports call a model: "name", of at most 16 characters if one thing was planted, and "about".

    Args:
        planted: What was planted in it, as training.json records it. A recovery is trained, and so has no words.
    """
    names = []
    descriptions = []
    for record in planted:
        match record:
            case {"planted": "random", "weights": "shuffled"}:
                names.append("LLM shuffled")
                descriptions.append("LLM shuffled")
            case {"planted": "random", "weights": weights}:
                names.append("LLM drawn anew")
                descriptions.append(f"LLM drawn anew ({weights})")
            case {"planted": "drop", "merged": []}:
                names.append("adapter intact")
                descriptions.append("adapter merges no pairs of classes")
            case {"planted": "drop", "merged": pairs}:
                names.append("adapter merged")
                descriptions.append(f"adapter merges {COUNTED_PAIRS[len(pairs)]} of classes")
    name = ", ".join(names) or "trained"
    return {"name": name, "about": ", ".join(descriptions) or "as trained"}
