"""`llava-bidir vqa` with the real harness, offline, on small datasets in the format of each benchmark."""

import json
import re
import shutil
from pathlib import Path

import lmms_datasets
import pytest
import tiny_models
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_bidir import cli
from llava_bidir.commands.generate import answer
from llava_bidir.vqa.benchmarks import TABLE1

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-vqa/bin/python"
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        not PYTHON.exists(), reason=".venv-vqa does not exist; create it with `make vqa-venv`"
    ),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory, conversations) -> Path:
    """Write nine datasets of six records each, and five questions of the toy world."""
    folder = lmms_datasets.write(tmp_path_factory.mktemp("data"))
    shutil.copytree(conversations / "pictures", folder / "pictures")
    records = json.loads((conversations / "data.json").read_text())[:5]
    (folder / "questions.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NUM_IMAGE", "2")  # with it the harness passes every image of MMBench twice


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """Return a function that makes a python of the harness that runs stub.py first."""

    def make(stub: str) -> str:
        monkeypatch.setenv("STUB", stub)
        path = tmp_path / "python"
        path.write_text(f'#!/bin/sh\nexec {PYTHON} {Path(__file__).with_name("stub.py")} "$@"\n')
        path.chmod(0o755)
        return str(path)

    return make


def vqa(model, out, data, more: str = "") -> None:
    """Run the command, with more words of it."""
    words = f"vqa {model} --out {out} --data {data} --python {PYTHON} --batch-size 4 {more}"
    cli.main(words.split())


def items(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def answers(out: Path) -> dict[str, list[str]]:
    return {name: [item["answer"] for item in items(out, name)] for name in TABLE1}


@pytest.fixture(scope="module")
def runs(checkpoints, data, tmp_path_factory):
    """Results of the same weights under two masks, one of them also with batch size 1."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("NUM_IMAGE", "2")
        for mask in ("causal", "bidirectional"):
            vqa(checkpoints[mask], root / mask, data)
        tasks = " ".join([*TABLE1, "toy"])
        more = f"--batch-size 1 --tasks {tasks}"
        vqa(checkpoints["bidirectional"], root / "single", data, more)
    return root


def test_all_nine_run_and_fill_the_papers_row(runs):
    (model,) = json.loads((runs / "bidirectional/table1.json").read_text())["models"]
    assert len(model["columns"]) == 13
    assert model["columns"]["VizWiz"]["paper"] == 0.575
    assert all(len(items(runs / "bidirectional", name)) == 6 for name in TABLE1)
    info = json.loads((runs / "bidirectional/gqa.json").read_text())
    assert info["versions"]["lmms_eval"] == "0.7.3"
    assert info["image_attention"] == "bidirectional"
    assert (info["documents"], info["batch_size"]) == (6, 4)
    assert (info["processes"], info["device"]) == (1, "cpu")


def test_answers_do_not_depend_on_the_batch(runs):
    assert answers(runs / "bidirectional") == answers(runs / "single")


def test_options_that_the_harness_draws_are_marked(runs):
    """MMMU's rule looks for an option's letter or text in an answer, and draws one if there is none."""
    found = set()
    for item in items(runs / "causal", "mmmu"):
        choice = "Answer with the option's letter" in item["question"]
        guessed = choice and not any(word in item["answer"] for word in lmms_datasets.WORDS)
        assert item.get("guessed", False) == guessed
        found.add((choice, guessed))
    assert found == {(True, True), (True, False), (False, False)}


def test_answers_of_mmbench_that_name_no_option_are_marked(runs):
    """Its rule looks for a letter on its own or the text of one option."""
    for item in items(runs / "causal", "mmbench"):
        texts = [word in item["answer"].lower() for word in [*lmms_datasets.WORDS, "nan"]]
        letter = re.search(r"\b[ABCD]\b", item["answer"])
        assert item.get("guessed", False) == (letter is None and sum(texts) != 1), item["answer"]


def test_answers_are_those_of_generate(runs, checkpoints, data):
    """Ask every question without the harness: prompt, padding and mask are the same."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoints["bidirectional"]).eval()
    processor = AutoProcessor.from_pretrained(checkpoints["bidirectional"])
    sources = {  # folder, configuration, longest answer
        "gqa": ("GQA", "testdev_balanced_images", 16),
        "mmbench": ("MMBench", "en", 1024),
        "mme": ("MME", "default", 16),
        "mmmu": ("MMMU", "default", 128),
        "pope": ("POPE", "default", 128),
        "scienceqa": ("ScienceQA", "ScienceQA-IMG", 16),
        "textvqa_ocr": ("textvqa", "default", 128),
        "vizwiz": ("VizWiz-VQA", "default", 128),
    }
    for name, (folder, config, longest) in sources.items():
        (split,) = load_dataset(str(data / lmms_datasets.ORGANISATION / folder), config).values()
        for item in items(runs / "bidirectional", name):
            record = split[item["item"] // 2 if name == "gqa" else item["item"]]
            images = [record[key] for key in sorted(record) if isinstance(record[key], Image.Image)]
            expected = answer(
                model,
                processor,
                [item["question"]],
                [images],
                longest,
            )
            assert [item["answer"]] == expected, name
    assert (
        "Reference OCR token: sky, wall"
        in items(runs / "bidirectional", "textvqa_ocr")[0]["question"]
    )
    assert "Reference" not in items(runs / "bidirectional", "textvqa")[0]["question"]


def test_finished_tasks_are_not_run_again_but_checked_again(
    runs,
    checkpoints,
    data,
    tmp_path,
    capsys,
):
    out = shutil.copytree(runs / "causal", tmp_path / "out")
    vqa(checkpoints["causal"], out, data, "--python /nowhere")
    assert "clip causal" in capsys.readouterr().out
    (out / "pope.jsonl").write_text(
        "".join((out / "pope.jsonl").read_text().splitlines(keepends=True)[:-1])
    )
    with pytest.raises(
        SystemExit, match="pope: 1 of 6 items have no or several results, e.g. item 5$"
    ):
        vqa(checkpoints["causal"], out, data, "--python /nowhere")
    (out / "pope.json").unlink()
    vqa(checkpoints["causal"], out, data)
    assert items(out, "pope") == items(runs / "causal", "pope")


def test_results_of_another_checkpoint_are_not_reused(runs, checkpoints, data):
    with pytest.raises(
        SystemExit, match=r"causal/gqa.json belongs to another checkpoint .* choose another --out"
    ):
        vqa(checkpoints["bidirectional"], runs / "causal", data, "--python /nowhere")


def test_results_on_other_data_are_not_reused(
    runs,
    checkpoints,
    data,
    tmp_path,
):
    copy = shutil.copytree(data, tmp_path / "data")
    with pytest.raises(
        SystemExit, match=r"causal/pope.json belongs to other data .* choose another --out"
    ):
        vqa(checkpoints["causal"], runs / "causal", copy, "--tasks pope --python /nowhere")


def test_scores_are_the_harnesss_where_some_answers_are_right(
    checkpoints,
    data,
    tmp_path,
    stubbed,
):
    """Answers are right in the first half of each task. `vqa` compares our scores with the harness's."""
    vqa(checkpoints["causal"], tmp_path / "out", data, f"--python {stubbed('oracle')}")
    (model,) = json.loads((tmp_path / "out/table1.json").read_text())["models"]
    scores = {title: column["score"] for title, column in model["columns"].items()}
    expected = dict.fromkeys(("GQA", "MMMU", "POPE", "SQA-I", "VizWiz"), 1 / 2)
    # the three targets of the first half are answered, the wrong ones are the other word
    expected |= {"MMBench": 1 / 3, "POPE F1": 4 / 7, "POPE F1 all": 4 / 7, "POPE yes": 2 / 3}
    expected |= {"MME-P": 100, "MME-C": 50}
    expected |= {"TextVQA": 0.45, "TextVQA OCR": 0.45}
    assert scores == pytest.approx(expected)


def test_item_that_cannot_be_answered_ends_the_run_by_name(
    checkpoints,
    data,
    tmp_path,
    stubbed,
):
    with pytest.raises(
        SystemExit, match="^llava-bidir: pope: item 4, 5: FloatingPointError: out of range$"
    ):
        more = f"--python {stubbed('raises')} --tasks pope"
        vqa(checkpoints["causal"], tmp_path / "out", data, more)
    assert not (tmp_path / "out/pope.json").exists()


def test_harness_that_succeeds_without_results_is_an_error(checkpoints, data, tmp_path):
    """The harness's own command does this for every exception."""
    with pytest.raises(SystemExit, match="gqa, mme: the harness succeeded but wrote no results"):
        vqa(checkpoints["causal"], tmp_path, data, "--python /bin/true --tasks gqa mme")


def test_missing_and_cut_images_end_the_run_by_name(checkpoints, data, tmp_path):
    pictures = tmp_path / "data"
    shutil.copytree(data, pictures)
    gqa = pictures / lmms_datasets.ORGANISATION / "GQA"
    shutil.rmtree(gqa)
    for name in ("GQA", "GQA:images"):
        config, split, make_records = lmms_datasets.DATASETS[name]
        records = list(make_records(6))
        lmms_datasets.write_one(
            gqa, config, split, records[:-1] if name == "GQA:images" else records
        )
    with pytest.raises(SystemExit, match="gqa: KeyError: 'n2'"):
        vqa(checkpoints["causal"], tmp_path / "out", pictures, "--tasks gqa")
    whole = lmms_datasets.picture(0).resize((64, 64))
    whole.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-2000])
    asked = {"conversations": tiny_models.turns("<image>\nsky", "wall")}
    records = [{"id": name, "image": f"{name}.png"} | asked for name in ("whole", "cut")]
    (tmp_path / "questions.json").write_text(json.dumps(records))
    with pytest.raises(
        SystemExit, match="toy: item 1, its image: OSError: image file is truncated"
    ):
        vqa(checkpoints["causal"], tmp_path / "out", tmp_path, "--tasks toy")


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        ("version", "has lmms_eval 0.7.2 instead of 0.7.3; recreate it with `make"),
        ("code", "has another llava_bidir, at another; run `make vqa-venv`"),
    ],
)
def test_other_versions_and_other_code_are_rejected(
    stub,
    message,
    checkpoints,
    data,
    tmp_path,
    stubbed,
):
    with pytest.raises(SystemExit, match=f"setting up: the harness's environment {message}"):
        vqa(checkpoints["causal"], tmp_path, data, f"--python {stubbed(stub)} --tasks gqa")


def test_bad_options_are_errors_before_the_harness_answers(checkpoints, data, tmp_path):
    with pytest.raises(
        SystemExit, match="/nowhere/python does not exist; create it with `make vqa-venv`"
    ):
        vqa(checkpoints["causal"], tmp_path, data, "--python /nowhere/python")
    with pytest.raises(SystemExit, match="--data .*/none is not a folder"):
        vqa(checkpoints["causal"], tmp_path, tmp_path / "none")
    with pytest.raises(SystemExit, match="gqa: --data .* has no folder lmms-lab-encoder/GQA"):
        vqa(checkpoints["causal"], tmp_path, tmp_path, "--tasks gqa")


@pytest.mark.distributed
def test_two_processes_answer_every_item_once_with_the_same_results(
    runs,
    checkpoints,
    data,
    tmp_path,
):
    """Five records cannot be split evenly. The harness then repeats one."""
    vqa(checkpoints["bidirectional"], tmp_path, data, "--devices 2 --tasks gqa mme toy")
    for name in ("gqa", "mme", "toy"):
        assert items(tmp_path, name) == items(runs / "single", name)
        assert json.loads((tmp_path / f"{name}.json").read_text())["processes"] == 2


def test_toy_questions_are_scored_as_the_demo_does(checkpoints, conversations, tmp_path):
    """Half the targets are the model's answers, so the score is 0.5; stock llava gives the same answers."""
    from llava_bidir.model.hf_export import as_llava, export_hf

    model = AutoModelForImageTextToText.from_pretrained(checkpoints["causal"]).eval()
    processor = AutoProcessor.from_pretrained(checkpoints["causal"])
    records = [r for r in json.loads((conversations / "data.json").read_text()) if "image" in r]
    for i, record in enumerate(records):
        question = record["conversations"][0]["value"].removeprefix("<image>\n")
        picture = Image.open(conversations / record["image"]).convert("RGB")
        (said,) = answer(model, processor, [question], [[picture]], 16)
        record["conversations"][1]["value"] = said if i % 2 else f"{said} not"
    shutil.copytree(conversations / "pictures", tmp_path / "pictures")
    (tmp_path / "questions.json").write_text(json.dumps(records))
    export_hf(as_llava(model), processor, tmp_path / "stock")
    for name, path in (("ours", checkpoints["causal"]), ("stock", tmp_path / "stock")):
        vqa(path, tmp_path / name, tmp_path, "--tasks toy")
        (found,) = json.loads((tmp_path / name / "table1.json").read_text())["models"]
        assert found["columns"]["Toy"]["score"] == 0.5
    assert items(tmp_path / "ours", "toy") == items(tmp_path / "stock", "toy")
