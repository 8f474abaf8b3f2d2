"""Operations of the lab, against the public API."""

import base64
import io
import json

import labs
import numpy as np
import pytest
import torch
from PIL import Image

import probes
from llava_bidir.common.errors import UserError
from probes.lab.models import example_questions, load_checkpoint
from probes.lab.photos import encode
from probes.lab.requests import (
    MAX_ANSWER_TOKENS,
    AnswerAttention,
    Attention,
    Block,
    PatchView,
    PhotoQuestion,
    Replace,
    SiteView,
    View,
)
from probes.lab.session import Session, split_answer
from probes.tasks.segmentation import colorize_classes


def block(*patches: int, **limits) -> Block:
    return Block(
        kind="block",
        patches=patches,
        **limits,
    )


def hidden(*patches: int) -> probes.Knockout:
    """Return the knockout written out."""
    return probes.Knockout(torch.tensor([[t in patches for t in range(4)]]))


BLOCK = block(0, 2)
CHANGES = {
    "none": None,
    "block": BLOCK,
    "layers": block(1, layers=(2, 3)),
    "mean": Replace(
        kind="replace",
        patches=(0, 3),
        site="layer_01",
        by="mean",
    ),
    "other mask": Replace(
        kind="replace",
        patches=(1, 2),
        site="layer_01",
        by="other_mask",
    ),
    "other photo": Replace(
        kind="replace",
        patches=(1, 2),
        site="adapter",
        by="split:3",
    ),
}


def numbers(text: str, kind: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind).reshape(shape)


def read(session: Session, request: View) -> tuple[np.ndarray, np.ndarray]:
    """Return classes and probabilities as the page receives them."""
    result = session.read(request, labs.JOB)
    sites = len(session.models[request.model].sites)
    return numbers(
        result["classes"],
        "u1",
        3,
        sites,
        4,
    ), numbers(
        result["probabilities"],
        "<f4",
        3,
        sites,
        4,
    )


def states_of(session: Session, request: View) -> dict[str, torch.Tensor]:
    """Return the states of a view by the Python API."""
    model = session.models[request.model]
    blocked = None if request.intervention is None else hidden(*request.intervention.patches)
    image = session.photos.get(request.photo).squares[request.model]
    return model.mllm.states(model.mllm.preprocess([image]), model.sites, blocked)


@pytest.mark.parametrize("change", [None, BLOCK])
def test_similarity_and_colours_are_those_of_the_python_api(session, change):
    view = View(photo="split:1", model=1, intervention=change)
    mllm = session.models[1].mllm
    states = states_of(session, view)
    asked = PatchView(**dict(view), patch=2)
    found = session.similarity(asked, labs.JOB)["similarity"]
    expected = torch.stack([*mllm.similarity(states, (1, 0)).values()]).flatten(1)
    assert np.array_equal(numbers(found, "<f4", *expected.shape), expected.numpy())
    views = [View(photo="split:1", model=1)] + [view] * (change is not None)
    together = [states_of(session, x) for x in views]
    joined = {site: torch.cat([x[site] for x in together]) for site in states}
    colours = session.pca(view, labs.JOB)["colours"]
    assert len(colours) == len(views)
    for i, of_view in enumerate(colours):
        read = numbers(of_view, "u1", len(states), 2, 2, 3)
        for s, of_site in enumerate(probes.pca_colours(joined).values()):
            assert np.array_equal(read[s], (255 * of_site[i]).round().numpy())


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", [0, 1])
def test_views_have_the_numbers_of_the_python_api(session, change, model):
    view = View(photo="split:1", model=model, intervention=CHANGES[change])
    best = labs.read_directly(session, view).topk(3)  # [S, T, k]
    classes, shares = read(session, view)
    assert (classes == best.indices.permute(2, 0, 1).numpy()).all()
    assert (shares == best.values.permute(2, 0, 1).numpy()).all()


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_uploaded_photo_is_read_and_asked_as_the_python_api_does(session, orientation):
    """A phone's photo is turned by its EXIF tag, as viewers show it."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8)
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    image.getexif()[0x0112] = orientation
    image.save(file, "PNG", exif=image.getexif())
    turned = Image.fromarray(np.rot90(pixels, -1) if orientation == 6 else pixels)
    view = {
        "photo": session.photos.add(file.getvalue(), "photo.png"),
        "model": 1,
        "intervention": BLOCK,
    }
    assert session.photos.get(view["photo"]).size == turned.size
    _, shares = read(session, View(**view))
    expected = labs.read_directly(session, View(**view), turned)
    assert (shares[0] == expected.amax(-1).numpy()).all()
    asked = session.ask(PhotoQuestion(**view, question="What is 'it'?"), labs.JOB)
    answer = session.models[1].mllm.answer(
        turned, "What is 'it'?", hidden(*BLOCK.patches), MAX_ANSWER_TOKENS
    )
    assert asked["blocked"]["answer"] == answer


def test_pixel_map_is_the_prediction_of_the_run(session, lab_runs):
    request = SiteView(
        photo="split:2",
        model=0,
        site="layer_02",
    )
    shown = Image.open(io.BytesIO(base64.b64decode(session.pixel_map(request, labs.JOB)["png"])))
    run = probes.ProbeRun(lab_runs[0])
    predicted = run.predict(run.dataset()[2]["image"], "layer_02")
    assert (
        np.asarray(shown) == colorize_classes(predicted, np.array(session.palette, np.uint8))
    ).all()


def test_words_of_a_patch_are_those_of_the_map(session):
    view = {
        "photo": "split:0",
        "model": 0,
        "intervention": BLOCK,
    }
    by_site = session.words_of_patch(PatchView(**view, patch=2), labs.JOB)["words"]
    model = session.models[0]
    for site, words in zip(model.word_sites, by_site, strict=True):
        of_map = session.words_of_site(SiteView(**view, site=site), labs.JOB)["words"][2]
        assert [text for text, _ in of_map] == [text for text, _ in words]
    states = model.mllm.states(session._pixels(View(**view)), ["final_norm"], hidden(0, 2))
    best = model.mllm.logit_lens(states)["final_norm"][0, 2].softmax(-1).max()
    assert by_site[-1][0][1] == pytest.approx(best.item(), rel=1e-5)


@pytest.mark.parametrize("change", [None, BLOCK])
def test_attention_is_that_of_the_python_api(session, change):
    view = {
        "photo": "split:1",
        "model": 1,
        "intervention": change,
        "layer": 2,
    }
    mllm = session.models[1].mllm
    pixels = session._pixels(View(photo="split:1", model=1))
    knockout = change and hidden(*change.patches)
    (weights,) = mllm.attention(pixels, ["layer_02"], knockout, average_heads=False).values()
    result = session.attention(Attention(**view, patch=3), labs.JOB)
    assert numbers(result["to"], "<f4", 4, 4).tolist() == weights[0, :, 3].tolist()
    assert numbers(result["from"], "<f4", 4, 4).tolist() == weights[0, :, :, 3].tolist()
    word = view | {
        "question": "Sky?",
        "answer": "the sky",
        "token": 1,
    }
    result = session.answer_attention(AnswerAttention(**word), labs.JOB)
    (weights,) = mllm.answer_attention(
        pixels, "Sky?", "the sky", ["layer_02"], knockout, average_heads=False
    ).values()
    assert numbers(result["to"], "<f4", 4, 4).tolist() == weights[0, :, 1].tolist()
    with pytest.raises(UserError, match="token 99 does not exist"):
        session.answer_attention(AnswerAttention(**word | {"token": 99}), labs.JOB)


@pytest.mark.parametrize("answer", ["the sky is blue", "Straße 日本 🙂", "", "a"])
def test_the_parts_of_an_answer_are_one_per_token_and_join_to_it(session, answer):
    model = session.models[0]
    parts = split_answer(model, answer)
    assert "".join(parts) == answer
    assert len(parts) == (len(model.mllm.chat.answer_ids([answer])[0]) if answer else 0)


def test_kept_states_are_bounded(session, monkeypatch):
    monkeypatch.setattr("probes.lab.session.STATE_BYTES", 1)
    for image in range(3):
        read(session, View(photo=f"split:{image}", model=0))
        assert len(session._states) == 1


FIRST = {"photo": "split:0", "model": 0}
UNKNOWN = {
    "drop the same file again": {"photo": "upload:" + 64 * "0"},
    "patch 4 does not exist": {"intervention": block(4)},
    "layer 4 is out of range": {"intervention": block(1, layers=(4,))},
}


@pytest.mark.parametrize("message", UNKNOWN)
def test_a_view_that_does_not_exist_is_named(session, message):
    with pytest.raises(UserError, match=message):
        session.read(View(**FIRST | UNKNOWN[message]), labs.JOB)


def test_answers_and_attention_under_replaced_states_say_that_they_are_not_read(session):
    view = {
        "photo": "split:0",
        "model": 0,
        "intervention": CHANGES["mean"],
    }
    for operation, request in (
        (session.ask, PhotoQuestion(**view, question="x")),
        (
            session.attention,
            Attention(
                **view,
                patch=0,
                layer=1,
            ),
        ),
    ):
        with pytest.raises(UserError, match="not under replaced states"):
            operation(request, labs.JOB)


def test_a_checkpoint_without_probes_has_words_and_attention(checkpoints):
    session = Session(load_checkpoint(str(checkpoints["bidirectional"])))
    key = session.photos.add(encode(Image.new("RGB", (20, 10), "red"), "PNG"), "red.png")
    view = {"photo": key, "model": 0}
    facts = session.describe()
    assert facts["images"] == 0
    assert facts["classes"] == []
    assert facts["models"][0]["cannot_answer"] is None
    assert session.read(View(**view), labs.JOB) == {"classes": None}
    words = session.words_of_patch(PatchView(**view, patch=1), labs.JOB)["words"]
    assert len(words) == len(session.models[0].word_sites)
    with pytest.raises(UserError, match="no probe at 'layer_01'"):
        session.pixel_map(SiteView(**view, site="layer_01"), labs.JOB)


def test_questions_of_the_data_set_are_offered(
    session,
    lab_runs,
    tmp_path,
    monkeypatch,
):
    model = session.models[0]
    assert example_questions(model) == []

    def record(text):
        return {"conversations": [{"from": "human", "value": f"<image>\n{text}"}]}

    root = tmp_path / "data"
    monkeypatch.setitem(model.run.manifest["data"], "root", str(root))
    (tmp_path / "questions.json").write_text(
        json.dumps([record(t) for t in ("a?", "a?", "b?", "c?", "d?")])
    )
    assert example_questions(model) == ["a?", "b?", "c?"]
    (tmp_path / "questions.json").write_text("{")
    assert example_questions(model) == []
