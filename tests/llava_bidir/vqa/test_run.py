"""`llava-bidir vqa` with the real harness, offline, on small datasets in the format of each benchmark."""

import json
import shutil
from pathlib import Path

import datasets
import lmms_datasets
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_bidir import cli
from llava_bidir.commands.generate import answer
from llava_bidir.vqa.scores import BENCHMARKS

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-vqa/bin/python"
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        not PYTHON.exists(), reason=".venv-vqa does not exist; create it with `make vqa-venv`"
    ),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Nine datasets of six records each."""
    return lmms_datasets.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        yield


def vqa(model, out, data, more: str = "") -> None:
    """Run the command on the folder of the data, with more words of it."""
    words = f"vqa {model} --out {out} --data {data} --python {PYTHON} --batch-size 4 {more}"
    cli.main(words.split())


def items(out: Path, name: str) -> list[dict]:
    return json.loads((out / f"{name}.json").read_text())["items"]


def test_one_task(checkpoints, data, tmp_path, monkeypatch):
    """In CI: the options reach lmms-eval's environment, whose packages could not be imported for a week."""
    monkeypatch.chdir(tmp_path)
    vqa(checkpoints["causal"], out="out", data=data, more="--tasks pope")
    assert len(items(Path("out"), "pope")) == 6


@pytest.fixture(scope="module")
def runs(checkpoints, data, tmp_path_factory):
    """Results of the same weights under two masks, four questions a batch."""
    root = tmp_path_factory.mktemp("runs")
    for mask in ("causal", "bidirectional"):
        vqa(checkpoints[mask], root / mask, data)
    return root


def test_all_nine_run_and_fill_the_papers_row(runs):
    rows = json.loads((runs / "bidirectional/table1.json").read_text())["rows"]
    assert len(rows) == 11
    assert rows[-1]["column"] == "VizWiz"
    assert rows[-1]["paper"] == 0.575
    assert all(len(items(runs / "bidirectional", name)) == 6 for name in BENCHMARKS)
    info = json.loads((runs / "bidirectional/gqa.json").read_text())
    assert info["lmms_eval"] == "0.7.3"
    assert (info["image_attention"], info["encoder"]) == ("bidirectional", "clip")
    assert (len(info["items"]), info["batch_size"], info["dtype"]) == (6, 4, "torch.float32")


def test_answers_are_those_of_generate(runs, checkpoints):
    """Ask every question without the harness: prompt, padding and mask are the same."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoints["bidirectional"]).eval()
    processor = AutoProcessor.from_pretrained(checkpoints["bidirectional"])
    sources = {  # folder, longest answer
        "gqa": ("GQA", 16),
        "mmbench": ("MMBench", 1024),
        "mme": ("MME", 16),
        "mmmu": ("MMMU", 128),
        "pope": ("POPE", 128),
        "scienceqa": ("ScienceQA", 16),
        "textvqa_ocr": ("textvqa", 128),
        "vizwiz": ("VizWiz-VQA", 128),
    }
    for name, (folder, longest) in sources.items():
        for item in items(runs / "bidirectional", name):
            record = lmms_datasets.DATASETS[folder][2](item["item"])
            images = [record[key] for key in sorted(record) if isinstance(record[key], Image.Image)]
            images = images or [lmms_datasets.picture(item["item"] // 2)]  # GQA's are apart
            expected = answer(
                model,
                processor=processor,
                questions=[item["question"]],
                images=[images],
                max_new_tokens=longest,
            )
            assert [item["answer"]] == expected, name
    with_ocr, without = (
        items(runs / "bidirectional", name)[0]["question"] for name in ("textvqa_ocr", "textvqa")
    )
    assert "Reference OCR token: sky, wall" in with_ocr
    assert "Reference" not in without


def test_finished_tasks_are_not_run_again(runs, checkpoints, data, tmp_path, capsys):
    out = shutil.copytree(runs / "causal", tmp_path / "out")
    elsewhere = "--python /nowhere"
    vqa(checkpoints["causal"], out=out, data=data, more=elsewhere)
    assert "clip causal GQA" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match=r"out/gqa.json is of another checkpoint"):
        vqa(checkpoints["bidirectional"], out=out, data=data, more=elsewhere)
    (out / "pope.json").unlink()
    with pytest.raises(SystemExit, match="`make vqa-venv` installs: .*/nowhere"):
        vqa(checkpoints["causal"], out=out, data=data, more=elsewhere)
    vqa(checkpoints["causal"], out, data)
    assert items(out, "pope") == items(runs / "causal", "pope")


def test_scores_are_the_harnesss_where_some_answers_are_right(
    checkpoints, data, tmp_path, monkeypatch
):
    """Answers are right in the first half of each task."""
    python = tmp_path / "python"  # of the harness, which runs stub.py first
    python.write_text(f'#!/bin/sh\nexec {PYTHON} {Path(__file__).with_name("stub.py")} "$@"\n')
    python.chmod(0o755)
    vqa(checkpoints["causal"], out=tmp_path / "out", data=data, more=f"--python {python}")
    rows = json.loads((tmp_path / "out/table1.json").read_text())["rows"]
    scores = {row["column"]: row["value"] for row in rows}
    expected = dict.fromkeys(("GQA", "MMMU", "POPE", "SQA-I", "VizWiz"), 1 / 2)
    # the three targets of the first half are answered, the wrong ones are the other word
    expected |= {"MMBench": 1 / 3, "POPE F1": 4 / 7}
    expected |= {"MME-P": 100, "MME-C": 50}
    expected |= {"TextVQA": 0.45, "TextVQA OCR": 0.45}
    assert scores == pytest.approx(expected)


def test_a_cut_image_ends_the_run_by_name(checkpoints, data, tmp_path, capfd, monkeypatch):
    """lmms-eval has it filled with grey, and its own command succeeds where an item raises."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # whose cache tells folders by their names
    pictures = shutil.copytree(data, tmp_path / "data")
    file = pictures / lmms_datasets.ORGANISATION / "POPE/default.parquet"
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path))
    rows = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[5]["image"]["bytes"] = rows[5]["image"]["bytes"][:-60]
    features = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path)).features
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(file))
    with pytest.raises(SystemExit, match="^llava-bidir: lmms-eval, .*non-zero exit status"):
        vqa(checkpoints["causal"], out=tmp_path / "out", data=pictures, more="--tasks pope")
    assert "items 4, 5: OSError: image file is truncated" in capfd.readouterr().err
    assert not (tmp_path / "out/pope.json").exists()


@pytest.mark.distributed
def test_two_processes_answer_every_item_once_with_the_same_results(
    runs, checkpoints, data, tmp_path
):
    vqa(
        checkpoints["bidirectional"],
        out=tmp_path,
        data=data,
        more="--devices 2 --batch-size 1 --tasks gqa mme",
    )
    for name in ("gqa", "mme"):
        assert items(tmp_path, name) == items(runs / "bidirectional", name)
