"""Operations of the lab, against the public API."""

import base64
import io

import labs
import numpy as np
import pytest
import torch
from PIL import Image

import probes
from probes.lab.models import open_checkpoint
from probes.lab.photos import encode_image
from probes.lab.requests import (
    MAX_ANSWER_TOKENS,
    Attention,
    Block,
    PatchView,
    PhotoQuestion,
    Replace,
    ShownViews,
    SiteView,
    View,
)
from probes.lab.session import Session
from probes.tasks.segmentation import colorize_classes

BLOCK = Block(kind="block", patches=(0, 2))
BLOCKED = probes.Knockout(torch.tensor([[True, False, True, False]]))  # the same, written out
VIEW = {"photo": "split:1", "model": 1}


def replace(site: str, by: str) -> Replace:
    return Replace(kind="replace", patches=(1, 2), site=site, by=by)


def numbers(text: str, kind: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind).reshape(shape)


def read(session: Session, request: View) -> tuple[np.ndarray, np.ndarray]:
    """Return classes and probabilities as the page receives them."""
    result = session.read(request, labs.JOB)
    shape = (3, len(session.models[request.model].sites), 4)
    classes = numbers(result["classes"], "u1", *shape)
    return classes, numbers(result["probabilities"], "<f4", *shape)


@pytest.mark.parametrize(
    ("change", "beside"), [(None, None), (BLOCK, "split:3")], ids=["one", "three"]
)
def test_similarity_and_pca_colours_over_the_shown_views(session, change, beside):
    """Components are fitted over all views together, by numpy."""
    model = session.models[1]

    def states_of(photo: str, knockout=None) -> dict[str, torch.Tensor]:
        pixels = model.mllm.preprocess([session.photos.get(photo).squares[1]])
        return model.mllm.states(pixels, model.sites, knockout)

    views = [states_of("split:1")]
    if change:
        views += [states_of("split:1", BLOCKED), states_of(beside)]
    shown = ShownViews(**VIEW, intervention=change, beside=beside)
    colours = session.pca(shown, labs.JOB)["colours"]
    found = np.stack([numbers(of_view, "u1", len(views[0]), 4, 3) for of_view in colours])
    expected = torch.stack([*model.mllm.similarity(views[0], (1, 0)).values()])
    similarity = session.similarity(PatchView(**VIEW, patch=2), labs.JOB)["similarity"]
    assert np.array_equal(numbers(similarity, "<f4", *expected.shape), expected.numpy())
    relative = session.norms(View(**VIEW), labs.JOB)["norms"]
    norms = np.stack([np.linalg.norm(x[0].float().numpy(), axis=1) for x in views[0].values()])
    of_page = numbers(relative, "<f4", *norms.shape)
    np.testing.assert_allclose(of_page * np.sort(norms)[:, [1]], norms, rtol=1e-5)
    for s, site in enumerate(views[0]):
        x = np.concatenate([states[site][0].double().numpy() for states in views])
        u, scale, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
        scores = (u * scale)[:, :3]
        scores *= np.sign(scores[np.abs(scores).argmax(0), range(3)])
        expected = 255 * (scores - scores.min(0)) / np.ptp(scores, 0)
        assert np.abs(found[:, s].reshape(-1, 3) - expected).max() < 0.51


@pytest.mark.parametrize("model", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        None,
        BLOCK,
        Block(kind="block", patches=(1,), layers=(2, 3)),
        replace("layer_01", "mean"),
        replace("layer_01", "other_mask"),
        replace("adapter", "split:3"),
    ],
    ids=["none", "block", "layers", "mean", "other mask", "other photo"],
)
def test_views_have_the_numbers_of_the_python_api(session, change, model):
    view = View(photo="split:1", model=model, intervention=change)
    best = labs.read_directly(session, view).topk(3)  # [S, T, k]
    classes, shares = read(session, view)
    assert (classes == best.indices.permute(2, 0, 1).numpy()).all()
    assert (shares == best.values.permute(2, 0, 1).numpy()).all()


def test_an_uploaded_photo_is_read_and_asked_as_the_python_api_does(session):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8))
    key = session.photos.add(encode_image(image, "PNG"), "photo.png")
    view = {"photo": key, "model": 1, "intervention": BLOCK}
    _, shares = read(session, View(**view))
    expected = labs.read_directly(session, View(**view), image)
    assert (shares[0] == expected.amax(-1).numpy()).all()
    question = "What is 'it'?"
    asked = session.ask(PhotoQuestion(**view, question=question), labs.JOB)
    mllm = session.models[1].mllm
    assert asked["blocked"] == mllm.answer(image, question, BLOCKED, MAX_ANSWER_TOKENS)
    answers = (mllm.preprocess(image), question, [asked["answer"]])
    scores = [mllm.answer_log_probs(*answers, knockout).item() for knockout in (None, BLOCKED)]
    assert asked["log_probability"] == scores


def test_pixel_map_is_the_prediction_of_the_run(session, lab_runs):
    request = SiteView(photo="split:2", model=0, site="layer_02")
    shown = Image.open(io.BytesIO(base64.b64decode(session.pixel_map(request, labs.JOB)["png"])))
    run = probes.ProbeRun(lab_runs[0])
    predicted = run.predict(run.dataset()[2]["image"], "layer_02")
    expected = colorize_classes(predicted, np.array(session.palette, np.uint8))
    assert np.array_equal(np.asarray(shown), expected)


def test_words_are_those_of_the_logit_lens(session):
    view = VIEW | {"intervention": BLOCK}
    model = session.models[1]
    states = model.mllm.states(session._pixels(View(**view)), model.word_sites, BLOCKED)
    best = [x[0].softmax(-1).max(-1).values for x in model.mllm.logit_lens(states).values()]
    by_site = session.words_of_patch(PatchView(**view, patch=2), labs.JOB)["words"]
    shares = [words[0][1] for words in by_site]
    assert shares == pytest.approx([of_site[2].item() for of_site in best], rel=1e-5)
    of_map = session.words_of_site(SiteView(**view, site="final_norm"), labs.JOB)["words"]
    assert [text for text, _ in of_map[2]] == [text for text, _ in by_site[-1]]
    assert [words[0][1] for words in of_map] == pytest.approx(best[-1].tolist(), rel=1e-5)


def test_attention_is_that_of_the_python_api(session):
    asked = Attention(**VIEW, intervention=BLOCK, layer=2, patch=3)
    mllm = session.models[1].mllm
    weights = mllm.attention(session._pixels(asked), ["layer_02"], BLOCKED)["layer_02"][0]
    result = session.attention(asked, labs.JOB)
    assert numbers(result["to"], "<f4", 4).tolist() == weights[3].tolist()
    assert numbers(result["from"], "<f4", 4).tolist() == weights[:, 3].tolist()


def test_kept_states_are_bounded(session, monkeypatch):
    monkeypatch.setattr("probes.lab.session.STATE_BYTES", 1)
    for image in range(3):
        read(session, View(photo=f"split:{image}", model=0))
        assert len(session._states) == 1


def test_a_checkpoint_without_probes_has_words(checkpoints):
    session = Session(open_checkpoint(str(checkpoints["bidirectional"])))
    key = session.photos.add(encode_image(Image.new("RGB", (20, 10), "red"), "PNG"), "red.png")
    facts = session.describe()
    assert (facts["images"], facts["classes"]) == (0, [])
    assert session.read(View(photo=key, model=0), labs.JOB) == {"classes": None}
    words = session.words_of_patch(PatchView(photo=key, model=0, patch=1), labs.JOB)["words"]
    assert len(words) == len(session.models[0].word_sites)
