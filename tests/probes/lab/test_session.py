"""Operations of the lab, against the public API, and the Python code that it exports."""

import base64
import io
import json
from contextlib import contextmanager
from types import SimpleNamespace

import labs
import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

import probes
from llava_bidir.common.errors import UserError
from probes.data.folder import FolderDataset
from probes.lab.models import example_questions, load_checkpoint
from probes.lab.photos import encode
from probes.lab.requests import (
    AnswerAttention,
    Attention,
    Block,
    Export,
    Open,
    PaintedPhoto,
    Painting,
    PatchWords,
    PhotoQuestion,
    Replace,
    Save,
    SiteView,
    Teach,
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


def execute(session: Session, request: Export) -> dict:
    names: dict = {}
    exec(session.snippet(request, labs.JOB)["python"], names)
    return names


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", [0, 1])
def test_exported_code_gives_the_numbers_of_the_page(session, change, model):
    view = {
        "photo": "split:1",
        "model": model,
        "intervention": CHANGES[change],
    }
    names = execute(session, Export(**view))
    best = torch.stack(list(names["probabilities"].values())).topk(3)  # [S, T, k]
    classes, shares = read(session, View(**view))
    assert (classes == best.indices.permute(2, 0, 1).numpy()).all()
    assert (shares == best.values.permute(2, 0, 1).numpy()).all()


@pytest.mark.parametrize("orientation", [1, 6])
def test_exported_code_opens_an_uploaded_photo_and_asks(
    session,
    tmp_path,
    monkeypatch,
    orientation,
):
    """A phone's photo is turned by its EXIF tag, as viewers show it."""
    monkeypatch.chdir(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8))
    file = io.BytesIO()
    image.getexif()[0x0112] = orientation
    image.save(file, "PNG", exif=image.getexif())
    content = file.getvalue()
    name = 'it\'s a "photo".png'
    (tmp_path / name).write_bytes(content)
    view = {
        "photo": session.photos.add(content, name),
        "model": 1,
        "intervention": BLOCK,
    }
    assert session.photos.get(view["photo"]).size == ((30, 50) if orientation == 6 else (50, 30))
    question = "What is 'it'?"
    names = execute(session, Export(**view, question=question))
    _, shares = read(session, View(**view))
    assert (shares[0] == torch.stack(list(names["probabilities"].values())).amax(-1).numpy()).all()
    asked = session.ask(PhotoQuestion(**view, question=question), labs.JOB)
    assert names["answer"] == asked["blocked"]["answer"]


def test_interventions_change_what_is_read(session):
    shares = [
        read(
            session,
            View(
                photo="split:1",
                model=1,
                intervention=change,
            ),
        )[1]
        for change in CHANGES.values()
    ]
    assert len({x.tobytes() for x in shares}) == len(CHANGES)


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
    by_site = session.words_of_patch(PatchWords(**view, patch=2), labs.JOB)["words"]
    model = session.models[0]
    for site, words in zip(model.word_sites, by_site, strict=True):
        of_map = session.words_of_site(SiteView(**view, site=site), labs.JOB)["words"][2]
        assert [text for text, _ in of_map] == [text for text, _ in words]
    states = model.mllm.states(session._pixels(View(**view)), ["final_norm"], hidden(0, 2))
    best = model.mllm.logit_lens(states)["final_norm"][0, 2].softmax(-1).max()
    assert by_site[-1][0][1] == pytest.approx(best.item(), rel=1e-5)


@pytest.mark.parametrize("change", [None, BLOCK])
def test_exported_code_gives_the_attention_of_the_page(session, change):
    view = {
        "photo": "split:1",
        "model": 1,
        "intervention": change,
        "layer": 2,
    }
    names = execute(
        session,
        Export(
            **view,
            attention="attention",
            patch=3,
        ),
    )
    result = session.attention(Attention(**view, patch=3), labs.JOB)
    for direction, name in (("to", "attention_of_patch"), ("from", "attention_to_patch")):
        assert numbers(result[direction], "<f4", -1).tolist() == names[name].flatten().tolist()
    word = view | {
        "question": "Sky?",
        "answer": "the sky",
        "token": 1,
    }
    result = session.answer_attention(AnswerAttention(**word), labs.JOB)
    names = execute(session, Export(**word, attention="answer_attention"))
    assert numbers(result["to"], "<f4", 4, 4).tolist() == names["attention"].tolist()
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
    "it has 5 images": {"photo": "split:99"},
    "drop the same file again": {"photo": "upload:" + 64 * "0"},
    "this lab has 2": {"model": 2},
    "patch 4 does not exist": {"intervention": block(4)},
    "layer 4 is out of range": {"intervention": block(1, layers=(4,))},
    "hook at 'final_norm'": {
        "intervention": Replace(
            kind="replace",
            patches=(1,),
            site="final_norm",
            by="mean",
        )
    },
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
    words = session.words_of_patch(PatchWords(**view, patch=1), labs.JOB)["words"]
    assert len(words) == len(session.models[0].word_sites)
    code = session.snippet(Export(**view, intervention=CHANGES["mean"]), labs.JOB)["python"]
    assert "probes.load(" in code
    with pytest.raises(UserError, match="no probe at 'layer_01'"):
        session.pixel_map(SiteView(**view, site="layer_01"), labs.JOB)


def painting(*photos: tuple, rest: bool = False) -> Painting:
    """Paint patches of two concepts on photos of the split; by default on all five."""
    photos = photos or (((0,), (3,)), ((1,), (2,)), ((0, 1), (2,)), ((0,), (1, 3)), ((2,), (0, 1)))
    names = tuple(f"split:{i}" for i in range(5))
    pairs = zip(names, photos, strict=False)
    return Painting(
        concepts=("road", "it's"),
        photos=tuple(PaintedPhoto(photo=k, patches=p) for k, p in pairs),
        rest=rest,
    )


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("change", [None, BLOCK])
def test_exported_code_teaches_what_the_page_shows(session, change, rest):
    view = {
        "photo": "split:1",
        "model": 0,
        "intervention": change,
        "painting": painting(rest=rest),
    }
    names = execute(session, Export(**view))
    best = torch.stack(list(names["probabilities"].values())).topk(2 + rest)
    result = session.read(View(**view), labs.JOB)
    shares = numbers(
        result["probabilities"],
        "<f4",
        2 + rest,
        6,
        4,
    )
    np.testing.assert_allclose(shares, best.values.permute(2, 0, 1).numpy(), atol=2e-3)
    taught = names["taught"]
    assert taught.concepts == ["road", "it's", *["background"] * rest]
    curve = taught.curve(change and hidden(*change.patches))
    scores = session.teach(Teach(**view), labs.JOB)
    assert scores["chance"] == curve.chance[0]
    assert scores["patches"] == len(taught.paint.patch)
    shown = np.array(scores["scores"], dtype=float)
    np.testing.assert_allclose(
        shown, curve[["score", "low", "high"]].to_numpy(), atol=0.15
    )  # one patch in 13 may flip


@contextmanager
def cancelled(mllm):
    """As `Job.watched` after the client has left."""

    def leave(*_):
        raise InterruptedError

    hook = mllm.decoder.layers[-1].register_forward_pre_hook(leave)
    try:
        yield
    finally:
        hook.remove()


def test_a_random_llm_scores_beside_the_trained_one_which_then_reads_on(session):
    request = {
        "photo": "split:0",
        "model": 1,
        "painting": painting(),
    }
    view = View(
        photo="split:0",
        model=1,
        intervention=BLOCK,
    )
    trained = session.teach(Teach(**request), labs.JOB)
    before = read(session, view)
    with pytest.raises(InterruptedError):
        session.teach(
            Teach(**request, random=True),
            SimpleNamespace(**vars(labs.JOB) | {"watched": cancelled}),
        )
    for random in (False, True):
        scores = random and session.teach(Teach(**request, random=True), labs.JOB)["scores"]
        session._states.pop(view)
        after = read(session, view)  # starts from the states of the trained weights
        assert all((a == b).all() for a, b in zip(before, after, strict=True))
    assert scores[:2] == trained["scores"][:2], "encoder and adapter are the same"


def test_saved_folders_are_data_sets_and_open_to_the_same_paint(session, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "saved", tmp_path / "saved")
    request = painting()
    result = session.save(Save(**FIRST, painting=request), labs.JOB)
    assert result["folder"] == str(tmp_path / "saved/001")
    splits = [FolderDataset(result["folder"], split) for split in ("training", "validation")]
    assert [len(split) for split in splits] == [3, 2]
    assert splits[0].classes == ["road", "it's"]
    # of 2 x 2 patches, 12 x 10 pixels each; the first one is road, the last one it's
    expected = np.full((24, 20), 255)
    expected[:12, :10] = 0
    expected[12:, 10:] = 1
    assert (splits[0][0]["target"] == expected).all()
    content = {file: file.read_bytes() for file in (tmp_path / "saved").rglob("*.*")}
    again = session.save(Save(**FIRST, painting=painting(rest=True)), labs.JOB)
    assert again["folders"][0] == "002"
    assert all(file.read_bytes() == before for file, before in content.items()), (
        "nothing saved is replaced"
    )
    expected[expected == 255] = 2
    assert (FolderDataset(tmp_path / "saved/002", "training")[0]["target"] == expected).all()
    opened = session.open(Open(**FIRST, folder="001"), labs.JOB)
    assert opened["concepts"] == ["road", "it's"]
    patches = {name: patches for _, name, patches in opened["photos"]}
    assert patches == {
        f"{i:02d}.png": [*map(list, photo.patches)] for i, photo in enumerate(request.photos, 1)
    }
    for key, _, _ in opened["photos"]:
        assert session.photos.get(key).preview.size == (20, 24)


@pytest.mark.parametrize(
    ("classes", "images", "message"),
    [(2, 33, "has 33 pictures"), (21, 1, "has 21 classes"), (2, 0, "no images")],
)
def test_folders_that_the_lab_cannot_paint_are_named(
    session,
    tmp_path,
    monkeypatch,
    classes,
    images,
    message,
):
    monkeypatch.setattr(session, "saved", tmp_path)
    folder = tmp_path / "data"
    tiny_models.write_segmentation(folder, images, 0, size=(8, 8))
    for kind in ("images", "annotations"):
        (folder / kind / "validation").rmdir()
    names = [str(k) for k in range(classes)]
    (folder / "classes.json").write_text(json.dumps({"classes": names}))
    with pytest.raises(UserError, match=message):
        session.open(Open(**FIRST, folder="data"), labs.JOB)


def test_a_checkpoint_without_probes_is_taught(checkpoints, tmp_path):
    session = Session(load_checkpoint(str(checkpoints["causal"])), tmp_path)
    photos = []
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8)
        key = session.photos.add(encode(Image.fromarray(pixels), "PNG"), f"{i}.png")
        photos.append(PaintedPhoto(photo=key, patches=((0,), (3,))))
    view = {
        "photo": photos[0].photo,
        "model": 0,
        "painting": Painting(concepts=("a", "b"), photos=tuple(photos)),
    }
    result = session.read(View(**view), labs.JOB)
    assert numbers(result["classes"], "u1", 2, 6, 4).max() == 1
    assert "2 photos are too few" in session.teach(Teach(**view), labs.JOB)["note"]


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
    for broken in ("{", "[1]", '{"a": 1}', "[]"):
        (tmp_path / "questions.json").write_text(broken)
        assert example_questions(model) == []
