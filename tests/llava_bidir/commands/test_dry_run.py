"""`llava-bidir fit --dry-run`: what it prints without weights, its counts against all records, and what it refuses."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
from training_runs import make_data

import llava_bidir.cli
from llava_bidir.training.estimate import SAMPLED, longest_micro_batch, sample_records

PARTS = {"encoder": False, "adapter": True, "llm": True}


@pytest.fixture(scope="module")
def without_weights(parts, tmp_path_factory):
    """The folders of `parts` with configs and tokenizer alone."""
    root = tmp_path_factory.mktemp("configs")
    encoder, llm = parts
    for name, folder in (("encoder", encoder.path), ("llm", llm)):
        shutil.copytree(folder, root / name, ignore=shutil.ignore_patterns("*.safetensors"))
    return SimpleNamespace(path=root / "encoder"), root / "llm"


def run(without_weights, conversations, capsys, *more: str) -> str:
    words = tiny_models.training_arguments(without_weights, conversations)
    llava_bidir.cli.main(["fit", "--dry-run", *words, *more])
    return capsys.readouterr().out


def test_costs_are_those_of_the_contract(without_weights, conversations, capsys):
    """The demo's stage 2: 12 records, four a step."""
    more = "--json --trainer.max_epochs 2 --ckpt_path last".split()
    out = run(without_weights, conversations, capsys, *more)
    costs = json.loads(out.splitlines()[-1])
    assert (costs["steps"], costs["samples"], costs["devices"]) == (6, 24, 1)
    assert {part["part"]: part["trains"] for part in costs["parts"]} == PARTS
    memory = costs["memory_gb"]
    parts = [memory[x] for x in ("weights", "gradients", "optimizer", "activations", "logits")]
    assert memory["total"] == pytest.approx(sum(parts)) and min(parts[:4]) > 0
    assert costs["disk_gb"] > 0 and costs["missing_images"] == []
    seconds = costs["steps"] * costs["flops_per_step"] / (0.4 * 312e12)
    assert costs["gpu_hours"] == pytest.approx(seconds / 3600)


def test_hours_follow_from_the_peak_and_memory_from_the_gpu(without_weights, conversations, capsys):
    slow = "--throughput.peak_tflops 1e-9 --mfu 0.5 --gpu_gb 0.0001 --data.micro_batch_size 1"
    out = run(without_weights, conversations, capsys, *slow.split(), "--trainer.devices", "4")
    rows = {line[:12].strip(): line for line in out.splitlines()}
    assert "does not fit into 0.0001 GB" in rows["memory"]
    assert "4 GPUs" in rows["time"]
    hours = [float(rows[name][12:24].replace(",", "").split()[0]) for name in ("time", "GPU time")]
    assert hours[1] == pytest.approx(4 * hours[0], rel=1e-3) and hours[0] > 1


def test_images_that_are_not_there_are_named(without_weights, conversations, capsys, tmp_path):
    out = run(without_weights, conversations, capsys, "--data.images", str(tmp_path))
    missing = out.splitlines()[-1]
    assert missing.split()[:3] == ["missing", "10", "images"] and str(tmp_path) in missing


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trainer.strategy", "fsdp"], "the memory under fsdp is not known"),
        (["--trainer.devices", "3"], "not a multiple of data.micro_batch_size 4 x 3 devices"),
        (["--trainer.devices", "0"], "trainer.devices and trainer.num_nodes: 0 does not conform"),
        (["--trainer.num_nodes", "0"], "trainer.devices and trainer.num_nodes: 0 does not conform"),
        (["--trainer.devices", "two"], "trainer.devices and trainer.num_nodes: invalid literal"),
        (["--model.attn_implementation", "none"], "is not supported"),
        (["--mfu", "2"], "--mfu: invalid ShareAbove0 value: '2'"),
        (["--data.annotations", "none.json"], "data.annotations: no file none.json"),
    ],
)
def test_what_cannot_be_trained_or_known_is_refused(
    words, expected, without_weights, conversations, capsys
):
    with pytest.raises(SystemExit) as stop:
        run(without_weights, conversations, capsys, *words)
    assert expected in f"{stop.value} {capsys.readouterr().err}"


@pytest.fixture(scope="module")
def varied(parts, tmp_path_factory):
    """The data of many dialogues of very unequal lengths, some without an image, on two devices."""
    root = tmp_path_factory.mktemp("varied")
    numbers = random.Random(0)
    records = []
    for number in range(2 * SAMPLED):
        turns = ["name " * numbers.choice((1, 5, 40)), "wall " * numbers.choice((1, 3, 60))]
        turns *= numbers.choice((1, 1, 2, 6))
        record = {"id": str(number)}
        if number % 9:
            record["image"] = "a.png"
            turns[0] = "<image>\n" + turns[0]
        records.append(record | {"conversations": tiny_models.turns(*turns)})
    Path(root, "data.json").write_text(json.dumps(records))
    data = make_data(root, parts, group_by_length=True, max_length=300)
    data.trainer = SimpleNamespace(global_rank=0, world_size=2, log_every_n_steps=1)
    data.setup("fit")
    return data


def test_tokens_of_a_sample_of_records_stand_for_all(varied):
    sampled = sample_records(varied)
    lengths = []
    supervised = 0
    for index in range(len(varied.train)):
        ids, labels = varied.collate.encode(varied.train.without_pixels(index))
        lengths.append(len(ids[:300]))
        supervised += sum(label != -100 for label in labels[:300])
    share = len(lengths) / len(sampled.lengths)
    assert share * sum(sampled.lengths) == pytest.approx(sum(lengths), rel=0.02)
    assert share * sampled.supervised == pytest.approx(supervised, rel=0.02)
    assert share * sampled.images == pytest.approx(len(varied.train) * 8 / 9, rel=0.02)


def test_the_longest_micro_batch_is_that_of_all_devices(varied):
    batch = longest_micro_batch(varied)
    widths = []
    for rank in (0, 1):
        varied.sampler.rank = rank
        for indices in varied.sampler:
            samples = [varied.train.without_pixels(i) for i in indices]
            widths.append(max(len(varied.collate.encode(sample)[0]) for sample in samples))
    assert batch["input_ids"].shape == (2, min(max(widths), 300))
