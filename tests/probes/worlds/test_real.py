"""`probes real` without training: which commands it would run, on the toy world and on photos."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models

from llava_bidir.cli import OPTIONS
from llava_bidir.common.option_names import check_options
from llava_bidir.common.steps import find_missing, run_steps
from probes import cli
from probes.worlds import real, real_plan

MINUTES = 60
STEP_S = 10.0
STAGES = ("stage1", "stage2")


@pytest.fixture(autouse=True)
def without_models(monkeypatch):
    monkeypatch.setattr(real_plan, "measure_step", lambda llm, tokens: ("32-true", STEP_S))
    monkeypatch.setattr(real, "end_on_signals", lambda: None)  # handlers of this process
    monkeypatch.setattr(real, "show_language", lambda *args: None)


@pytest.fixture
def commands(monkeypatch):
    """Return a function that runs `real` and returns the commands of its steps by result, relative to OUT."""

    def run(out: Path, *words: str) -> dict[str, list[str]]:
        found = {}

        def run_in_child_process(folder, name, steps):
            found.update({str(step.result.relative_to(out)): list(step.config) for step in steps})

        monkeypatch.setattr(real, "run_in_child_process", run_in_child_process)
        monkeypatch.setattr(real, "find_model", lambda: Path("model.gguf"))
        cli.main(["real", "--out", str(out), "--train-only", *words])
        return found

    return run


@pytest.fixture
def photos(tmp_path) -> Path:
    return tiny_models.write_segmentation(tmp_path / "streets", 8, 8)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_steps_fit_the_time_on_the_world_and_on_photos(commands, photos, tmp_path):
    """The time of a mask's training, by hand: 0.9 of an hour for steps of 10 s, and of 3 s in stage 1."""
    found = commands(tmp_path / "world", "--minutes", str(MINUTES))
    for mask in real.MASKS:
        stage1, stage2 = (found[f"tuned/{mask}/{s}/hf/model.safetensors"] for s in STAGES)
        steps = [int(option(words, "--trainer.max_steps")) for words in (stage1, stage2)]
        assert steps == [249, 249]
        assert 3 * steps[0] + 10 * steps[1] == pytest.approx(0.9 * 3600, rel=0.01)
        assert option(stage2, "--model.image_attention") == mask
    found = commands(tmp_path / "photos", "--photos", str(photos), "--hours", "1")
    stage1, stage2 = (found[f"tuned/causal/{s}/hf/model.safetensors"] for s in STAGES)
    steps = [int(option(words, "--trainer.max_steps")) for words in (stage1, stage2)]
    assert steps == [334, 223]
    assert 3 * steps[0] + 10 * steps[1] == pytest.approx(0.9 * 3600, rel=0.01)


def test_models_on_photos_are_exported_at_a_tenth_and_a_third_of_stage_2(
    commands, photos, tmp_path
):
    found = commands(tmp_path / "out", "--photos", str(photos), "--steps", "600")
    stage1, stage2 = (found[f"tuned/causal/{s}/hf/model.safetensors"] for s in STAGES)
    assert option(stage1, "--trainer.max_steps") == "900"
    assert option(stage2, "--trainer.callbacks.steps") == "[60, 200]"
    assert "--trainer.callbacks.steps" not in stage1
    for words in (stage1, stage2):
        assert option(words, "--model.encoder.image_px") == "112"
        check_options("llava-bidir fit", words[2:], OPTIONS.read_text().split(), ())


def test_models_are_trained_again_if_their_records_have_changed(photos, tmp_path, monkeypatch):
    """Corrected captions do not change the questions, which are made from masks."""
    captions = tmp_path / "captions.json"
    out = tmp_path / "out"
    trained = []

    def run_in_child_process(folder, name, steps):
        missing = find_missing(steps, folder / "logs")
        trained.extend(step.name for step in missing)
        run_steps(missing, folder / "logs", write_weights)

    def write_weights(step):
        step.result.parent.mkdir(parents=True, exist_ok=True)
        step.result.write_text("weights")

    def call(text: str) -> list[str]:
        turns = tiny_models.turns("<image>\nDescribe it.", text)
        record = {"id": "0", "image": "000.png", "conversations": turns}
        captions.write_text(json.dumps([record]))
        shutil.rmtree(out / "photos", ignore_errors=True)
        trained.clear()
        words = f"real --out {out} --train-only --steps 6 --photos {photos} --captions {captions}"
        cli.main([*words.split(), "--caption-images", str(photos / "images/training")])
        return sorted(trained)

    monkeypatch.setattr(real, "run_in_child_process", run_in_child_process)
    monkeypatch.setattr(real, "write_models", lambda out: None)
    every_stage = sorted(f"tuned/{mask}/{stage}" for mask in real.MASKS for stage in STAGES)
    assert call("wrong") == every_stage
    assert call("wrong") == []
    assert set(call("right")) >= {f"tuned/{mask}/stage1" for mask in real.MASKS}


def test_options_of_photos_without_photos_are_an_error(tmp_path):
    for words in (
        ["--hours", "2"],
        ["--captions", "captions.json"],
        ["--image-px", "224"],
        ["--questions", "20"],
    ):
        with pytest.raises(SystemExit, match=f"{words[0]} needs --photos"):
            cli.main(["real", "--out", str(tmp_path), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--photos", "PHOTOS", "nowhere"], "no folder .*nowhere"),
        (["--photos", "PHOTOS", "--captions", "nowhere.json"], "nowhere.json is not a file"),
        (["--photos", "PHOTOS", "--image-px", "100"], "expected a multiple of 14"),
    ],
)
def test_a_mistyped_option_does_not_keep_the_right_one_out(
    words, message, commands, photos, tmp_path
):
    out = tmp_path / "out"
    words = [word.replace("PHOTOS", str(photos)) for word in words]
    with pytest.raises(SystemExit, match=message):
        commands(out, *words)
    assert commands(out, "--photos", str(photos))


def test_changed_masks_are_not_studied_with_models_of_the_earlier_ones(commands, photos, tmp_path):
    out = tmp_path / "out"
    commands(out, "--photos", str(photos))
    first, second = sorted((photos / "annotations/training").iterdir())[:2]
    first.write_bytes(second.read_bytes())
    message = "streets/training_masks have changed .* delete .*out/photos to train again"
    with pytest.raises(SystemExit, match=message):
        commands(out, "--photos", str(photos))
    shutil.rmtree(out / "photos")
    assert commands(out, "--photos", str(photos))


def test_a_folder_of_other_photos_is_not_continued(commands, photos, tmp_path):
    out = tmp_path / "out"
    commands(out, "--photos", str(photos))
    with pytest.raises(SystemExit, match="holds a result of"):
        commands(out)


def test_a_gpu_is_used_if_there_is_one(commands, photos, tmp_path, monkeypatch):
    words = ("--photos", str(photos), "--steps", "6")
    on_cpu = commands(tmp_path / "cpu", *words)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_gpu = commands(tmp_path / "gpu", *words)
    assert on_cpu.keys() == on_gpu.keys()
    for result, command in on_gpu.items():
        if "stage" in result:
            assert option(command, "--trainer.accelerator") == "gpu"
            assert "--trainer.accelerator" not in on_cpu[result]
            check_options("llava-bidir fit", command[2:], OPTIONS.read_text().split(), ())
