"""Table 1 of saved results of two checkpoints, against numpy."""

import json
from pathlib import Path

import numpy as np
import pytest

from llava_bidir import cli
from llava_bidir.common.files import write_files

CAUSAL, BIDIRECTIONAL = np.random.default_rng(0).random((2, 400)) < [[0.5], [0.65]]

WORDS = {"mmbench": "AB", "mme": ("Yes", "No"), "pope": ("yes", "no")}  # others: words


def write(out: Path, name: str, right: np.ndarray, mask: str = "causal", bits: int = 32) -> None:
    """Write a finished task with two questions per unit, whose targets alternate between two words."""
    words = WORDS.get(name, ("sky", "wall"))
    categories = ("existence", "code_reasoning") if name == "mme" else (None, None)
    items = [
        {
            "item": i,
            "unit": i // 2,
            "group": categories[i // 2 % 2],
            "question": f"question {i}",
            "target": words[i % 2],
            "answer": words[i % 2 if is_right else 1 - i % 2],
            "right": float(is_right),
        }
        for i, is_right in enumerate(right)
    ]
    about = {
        "model": f"clip-{mask}",
        "encoder": "clip",
        "image_attention": mask,
        "fingerprint": mask,
        "dtype": f"torch.float{bits}",
    }
    write_files({out / f"{name}.json": about | {"items": items}})


def make_table(root: Path, *models: str) -> dict[tuple[str, str], dict]:
    """Return the rows of Table 1 of results in folders below `root`, by mask and column, from ROOT/out."""
    folders = [str(root / model) for model in models]
    cli.main(["vqa-table", *folders, "--out", str(root / "out")])
    rows = json.loads((root / "out/table1.json").read_text())["rows"]
    return {(row["image_attention"], row["column"]): row for row in rows}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict[tuple[str, str], dict]:
    root = tmp_path_factory.mktemp("table")
    for name in ("gqa", "mmbench", "mme", "pope", "textvqa_ocr"):
        write(root / "a", name, CAUSAL)
        write(root / "b", name=name, right=BIDIRECTIONAL, mask="bidirectional")
    return make_table(root, "a", "b")


def ends(row: dict) -> list[float]:
    return [row["low"], row["high"]]


def around(mean: float, spread: float):
    return pytest.approx([mean - 1.96 * spread, mean + 1.96 * spread], abs=0.005)


def test_scores_intervals_and_the_papers_numbers(table):
    titles = ["GQA", "MMBench", "MME-P", "MME-C", "POPE", "POPE F1", "TextVQA OCR"]
    assert [title for mask, title in table if mask == "causal"] == titles
    images = CAUSAL.reshape(-1, 2)
    gqa = table["causal", "GQA"]
    assert gqa["value"] == pytest.approx(CAUSAL.mean())
    assert gqa["paper"] == 0.626
    assert ends(gqa) == around(CAUSAL.mean(), images.mean(1).std() / 200**0.5)
    assert table["causal", "MMBench"]["value"] == images.all(1).mean()
    assert table["bidirectional", "MME-P"]["paper"] == 1538
    perception = images[::2]
    expected = 100 * (perception.mean() + perception.all(1).mean())
    assert table["causal", "MME-P"]["value"] == pytest.approx(expected)
    assert table["causal", "TextVQA OCR"]["paper"] is None


def test_paired_differences_on_the_same_questions(table):
    pairs = {title: row for (mask, title), row in table.items() if " - " in mask}
    gqa = pairs["GQA"]
    per_image = (BIDIRECTIONAL.astype(float) - CAUSAL).reshape(-1, 2).mean(1)
    assert gqa["value"] == pytest.approx(per_image.mean())
    assert gqa["paper"] == pytest.approx(0.001)
    assert ends(gqa) == around(per_image.mean(), per_image.std() / 200**0.5)
    assert gqa["p"] < 0.001
    ps = [row["p"] for row in pairs.values()]
    assert min(row["p_holm"] for row in pairs.values()) == pytest.approx(7 * min(ps))
    assert all(row["p_holm"] >= row["p"] for row in pairs.values())
    coins = np.random.default_rng(9).choice([-1, 1], (20_000, 200)) @ per_image / 200
    assert gqa["p"] == pytest.approx((abs(coins) >= abs(gqa["value"])).mean(), abs=0.001)


def test_rounded_tables_mark_the_best_where_it_is_shown(table, tmp_path):
    """bidirectional is right 15 points more often; of equal models none is the best."""
    masks = {"a": "causal", "b": "bidirectional"}
    answers = {"a": CAUSAL, "b": BIDIRECTIONAL}
    for name, mask in masks.items():
        folder = tmp_path / name
        write(folder, name="gqa", right=answers[name], mask=mask)
        write(folder, name="textvqa", right=CAUSAL, mask=mask)
    rows = make_table(tmp_path, "a", "b")
    low, value, high = (100 * rows["bidirectional", "GQA"][key] for key in ("low", "value", "high"))
    lines = (tmp_path / "out/table1.md").read_text().splitlines()
    assert lines[0] == "| model | mask | source | GQA | TextVQA |"
    assert "**" not in lines[2] and lines[3].startswith("| clip | causal | paper | 62.6 | ")
    ours = lines[4].split(" | ")
    assert ours[3] == f"**{value:.1f}** [{low:.1f}, {high:.1f}]"
    assert "**" not in ours[4]
    latex = (tmp_path / "out/table1.tex").read_text()
    assert latex.count(r"\textbf{") == 1 and "\\bottomrule" in latex


@pytest.mark.parametrize(("right", "bits"), [(BIDIRECTIONAL[:-2], 32), (CAUSAL, 16)])
def test_models_that_differ_in_more_than_the_mask_are_not_compared(right, bits, tmp_path):
    write(tmp_path / "a", "gqa", CAUSAL)
    write(tmp_path / "b", name="gqa", right=right, mask="bidirectional", bits=bits)
    with pytest.raises(SystemExit, match="GQA: .*/a and .*/b differ in more than the mask"):
        make_table(tmp_path, "a", "b")


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="empty has no results of `llava-bidir vqa`"):
        make_table(tmp_path, "empty")
    assert not (tmp_path / "out").exists()
