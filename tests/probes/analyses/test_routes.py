"""Routes of answers: the analysis against a loop, and on models whose answers are read from their object or are not."""

import json
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import tiny_models
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from probes import Knockout
from probes.analyses import run as run_analysis
from probes.analyses.routes import RoutesOptions
from probes.analyses.routes.cuts import answer_statistics, outcomes, random_patches, windows
from probes.analyses.routes.questions import read_questions, tokens_in_box
from probes.cli import main
from probes.runs.read import ProbeRun
from probes.score.effects import read_effect_file

CLASSES = tiny_models.CLASSES
COLOURS = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]
QUESTION = "name the"


@pytest.fixture(scope="module")
def measured(runs, tmp_path_factory):
    """A run, its questions, and what the command wrote."""
    out = tmp_path_factory.mktemp("routes")
    questions = probe_runs.write_questions(runs["causal"], out)
    command = ["routes", "--probes", str(runs["causal"].path), "--questions", str(questions)]
    main([*command, "--out", str(out), "--draws", "2", "--window", "2", "--batch-size", "7"])
    results = json.loads((out / "routes.json").read_text())
    return runs["causal"], questions, results, load_file(out / "routes.safetensors")


def test_the_number_of_the_claim_is_written_with_its_resamplings(measured):
    """The mean over questions of how much less probable the answer is without its object than without others."""
    run, questions, results, tensors = measured
    effects, made_from = read_effect_file(questions.parent / "routes_effects.safetensors")
    own, other = (tensors[f"probability:{name} to text"][:, 0] for name in ("object", "random"))
    assert effects["route_object"].value == pytest.approx((other - own).mean().item(), abs=1e-6)
    assert len(effects["route_object"].resampled) == len(run.weights)
    assert effects["route_object"].about == {
        "n": {key: results[key] for key in ("images", "questions")}
    }
    assert made_from == run.fingerprint


def test_routes_equal_a_loop_over_knockouts(measured):
    run, path, _, tensors = measured
    mllm = run.mllm()
    file = read_questions(path, CLASSES)
    sets = {"question": "question", "text": ("question", "last", "answer")}
    for number, question in list(enumerate(file.questions))[:2]:
        pixels = mllm.preprocess([Image.open(path.parent / file.images[question.image])])
        states = mllm.states(pixels, run.sites)
        place = tokens_in_box(mllm.geometry, (1, 1), question.box)
        for site, probe in run.probes().items():
            read = probe(states[site])[0, place].mean(0).log_softmax(-1)
            of_question = tensors[f"probe:{site}"][number]
            torch.testing.assert_close(of_question, read, rtol=0, atol=1e-4)
        blocked = {"image": place | True, "object": place}
        for target, rows in sets.items():
            for source, patches in blocked.items():
                for i, layers in enumerate((None, [1, 2], [2, 3])):
                    knockout = Knockout(patches[None], layers, rows)
                    scores = mllm.answer_log_probs(
                        pixels, question=question.text, answers=CLASSES, knockout=knockout
                    )
                    scores = scores[0].log_softmax(-1)
                    of_question = tensors[f"right:{source} to {target}"][number, i]
                    torch.testing.assert_close(
                        of_question, scores[question.right], rtol=0, atol=1e-4
                    )
                    changed = scores.argmax() != tensors["none"][number].argmax()
                    assert tensors[f"changed:{source} to {target}"][number, i] == changed
                    correct = scores.argmax() == question.right
                    assert tensors[f"correct:{source} to {target}"][number, i] == correct


def test_intervals_resample_images_with_all_their_questions():
    """Ten copies of each question about an image are no new evidence."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "image": torch.arange(30).repeat_interleave(2),
        "right": torch.randint(3, (60,), generator=generator),
    }
    for reader in ("none", "probe:adapter"):
        tensors[reader] = torch.randn(60, 3, generator=generator).log_softmax(-1)
    copies = {key: value.repeat_interleave(10, 0) for key, value in tensors.items()}
    once, often = (answer_statistics(found, ["adapter"], 0) for found in (tensors, copies))
    assert (often["questions"], often["images"]) == (10 * once["questions"], once["images"])
    (site,), (site_often,) = once["sites"], often["sites"]
    for few, many in (
        (once["accuracy"], often["accuracy"]),
        (site["difference"], site_often["difference"]),
    ):
        assert many["ci95"] == pytest.approx(few["ci95"])


def test_random_patches_are_as_many_others():
    place = torch.tensor([True, False, True, False, False, False])
    drawn = random_patches(place, 200, [0, 3])
    assert (drawn.sum(1) == 2).all()
    assert not (drawn & place).any()
    assert (drawn[:, ~place].float().mean(0) - 0.5).abs().max() < 0.12, "each equally often"
    (random,) = random_patches(~place, 1, [0])
    assert random.sum() == (~place).sum() and random[place].all(), "the rest are the object's"


def test_windows_have_all_layers_first():
    assert windows(2, 7, stride=3) == [[1, 7], [1, 2], [4, 5]]


def test_a_blank_picture_is_asked_as_the_photo_is(measured):
    run, path, results, tensors = measured
    mllm = run.mllm()
    file = read_questions(path, CLASSES)
    for number, question in list(enumerate(file.questions))[:2]:
        photo = Image.open(path.parent / file.images[question.image]).convert("RGB")
        colour = tuple(np.asarray(photo).mean((0, 1)).round().astype(int).tolist())
        pixels = mllm.preprocess([Image.new("RGB", photo.size, colour)])
        scores = mllm.answer_log_probs(pixels, question=question.text, answers=CLASSES)
        torch.testing.assert_close(tensors["blank"][number], scores[0].log_softmax(-1))
    assert [*results["regimes"]] == ["name the"]


def test_accuracies_and_effects_are_means_over_questions(measured):
    _, _, results, tensors = measured
    said = tensors["none"].argmax(-1)
    for entry in results["sites"]:
        read = tensors[f"probe:{entry['site']}"].argmax(-1)
        for name, other in (("accuracy", tensors["right"]), ("agreement", said)):
            share = (read == other).double().mean().item()
            assert entry[name]["value"] == pytest.approx(share)
    none = tensors["none"][range(len(said)), tensors["right"]]
    for effect in results["effects"]:
        target = effect["target"]
        first, is_difference, second = effect["source"].partition(" - ")
        other = tensors[f"right:{second} to {target}"] if is_difference else none[:, None]
        expected = (tensors[f"right:{first} to {target}"] - other).double().mean(0)
        found = [entry["value"] for entry in (effect["all"], *effect["windows"])]
        assert found == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_probability_of_draws_is_their_mean_and_not_that_of_logarithms():
    scores = torch.tensor([[[0.9, 0.1]], [[0.001, 0.999]]]).log()
    found = outcomes("random to text", scores=scores, none=scores[0, 0], right=0)
    assert found["probability:random to text"].tolist() == pytest.approx([0.4505])


# ------------------------------------------------------------------------------------------ known truth
def write_world(folder: Path, images: int) -> Path:
    """Pictures of one coloured patch each, and a question about it."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(images):
        row, column = rng.integers(2, size=2)
        kind = int(rng.integers(3))
        pixels = rng.integers(100, 140, (2, 4, 2, 4, 3)).astype(np.uint8)
        pixels[row, :, column] = COLOURS[kind]
        Image.fromarray(pixels.reshape(8, 8, 3)).save(folder / f"{i}.png")
        box = [column / 2, row / 2, column / 2 + 0.5, row / 2 + 0.5]
        turn = {"from": "human", "value": QUESTION}
        record = {"image": f"{i}.png", "conversations": [turn]}
        records.append(record | {"regions": [{"box": box, "class": CLASSES[kind]}]})
    path = folder / "questions.json"
    path.write_text(json.dumps(records))
    return path


def train(mllm, questions: Path, steps: int) -> None:
    """Train adapter and LLM to answer, with all but the last 60 images."""
    file = read_questions(questions, CLASSES)
    pixels = mllm.preprocess([Image.open(questions.parent / name) for name in file.images[:-60]])
    right = torch.tensor([question.right for question in file.questions])
    model = mllm.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    answers = torch.tensor([ids[0] for ids in mllm.chat.answer_ids(CLASSES)])
    ids = torch.tensor([mllm.ids[0].tolist() + mllm.chat.question_ids(QUESTION)])
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(pixels), (32,), generator=generator)
        output = model(input_ids=ids.expand(32, -1), pixel_values=pixels[batch])
        loss = F.cross_entropy(output.logits[:, -1], answers[right[batch]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)


@pytest.mark.slow
def test_a_planted_route_is_found_and_none_in_a_model_that_was_not_trained(
    runs, tmp_path, monkeypatch
):
    """Patches do not mix before the LLM, since the encoder's attention is zero."""
    questions = write_world(tmp_path, 400)
    run = runs["causal"]
    results = {}
    claimed = {}
    for steps in (0, 150):
        mllm = run.mllm()
        for layer in mllm.encoder_layers.modules(mllm.model):
            torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
        train(mllm, questions, steps)
        held_out = questions.with_name("held_out.json")
        held_out.write_text(json.dumps(json.loads(questions.read_text())[-60:]))
        plan = RoutesOptions(
            probes=run.path, out=tmp_path / str(steps), questions=held_out, window=1, draws=2
        )
        with monkeypatch.context() as patch:
            patch.setattr(ProbeRun, "mllm", lambda self, mllm=mllm: mllm)
            run_analysis(plan)
        results[steps] = json.loads((plan.out / "routes.json").read_text())
        effects, _ = read_effect_file(plan.out / "routes_effects.safetensors")
        claimed[steps] = effects["route_object"]
    effects = {(x["source"], x["target"]): x for x in results[150]["effects"]}
    # the last token reads the object itself; one of three answers is the one without it
    assert results[150]["accuracy"]["value"] > 0.95
    assert claimed[150].value > 0.2
    assert effects["object - random", "text"]["all"]["ci95"][1] < -0.5
    assert effects["object", "text"]["changed"]["value"] > 0.2
    for route in (("random", "text"), ("object", "question")):
        assert abs(effects[route]["all"]["value"]) < 0.1
    assert claimed[0].value < 0.01
