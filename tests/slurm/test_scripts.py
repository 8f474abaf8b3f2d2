"""The job scripts without Slurm: the plan of the study, and the calls of a fake `sbatch`."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from processes import run_command
from transformers import LlamaConfig

from probes.cli import main
from probes.data import ade20k
from probes.rehearsal.inputs import ARMS as REHEARSED_ARMS
from probes.rehearsal.inputs import STUDY
from probes.studies.plan import make_plan

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch")])
ARMS = ["trained", "random0", "random1", "permuted0", "permuted1", "adapter0", "adapter1"]
MASKS = ["causal", "bidirectional"]
DATA = [
    "PYTHON",
    "VQA_PYTHON",
    "SEGMENTATION",
    "CAPTIONS",
    "CAPTION_IMAGES",
    "INSTRUCTIONS",
    "INSTRUCTION_IMAGES",
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(path):
    run_command(["bash", "-n", path])
    if shutil.which("shellcheck"):
        run_command(["shellcheck", "-x", path], cwd=ROOT)


@pytest.mark.parametrize("layout", ["ade20k", "voc2012", "photos"])
def test_study_job_runs_a_study_that_can_be_planned(
    layout,
    tmp_path,
    monkeypatch,
    checkpoints,
):
    """Its words are options of `probes study`, and of the parser of `probes solve`."""
    (tmp_path / "srun").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "photos").mkdir()
    for mask in MASKS:
        (tmp_path / f"clip-{mask}/stage2").mkdir(parents=True)
        (tmp_path / f"clip-{mask}/stage2/hf").symlink_to(checkpoints[mask])
    there = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SEGMENTATION": "masks",
        "RUNS": str(tmp_path),
        "SLURM_JOB_NAME": f"{tmp_path}/clip-causal/study",
    }
    config = layout
    if layout == "photos":  # a config of one's own, with options that the job sets, too
        config = tmp_path / "own.yaml"
        config.write_text("data:\n  root: elsewhere\ntrainer:\n  devices: 1\n")
    if layout != "ade20k":  # the default
        there |= {"LAYOUT": str(tmp_path / layout) if layout == "photos" else layout}
        there |= {"STUDY": f"-c {config} --add knockout.classes=auto:5"}
    job = ["bash", "slurm/study.sbatch", "clip", " ".join(MASKS), "--arms", "trained", "random1"]
    done = run_command(job, cwd=ROOT, env=os.environ | there)
    assert (tmp_path / "clip-causal/study.done").is_file(), "for six_configurations.sh"
    words = done.stdout.splitlines()
    planned = []
    monkeypatch.setattr(
        "probes.studies.run.run_study", lambda settings, overwrite: planned.append(settings)
    )
    monkeypatch.chdir(ROOT)
    main(words[words.index("probes") + 1 :])
    photos = range(8)  # the data are on the cluster
    monkeypatch.setattr("probes.studies.plan.open_split", lambda data, split: photos)
    steps = {step.name: step for step in make_plan(planned[0])}
    knockouts = {f"{mask}/{arm}/knockout" for mask in MASKS for arm in ("trained", "random1")}
    assert knockouts | {"bidirectional/trained/starvation", "report"} < {*steps}
    assert ("causal/probes" in steps) == (layout == "ade20k"), "the default also fits probes"
    assert steps["causal/trained"].config.data.dataset == (
        layout if layout != "photos" else "folder"
    )
    root = tmp_path / "photos" if layout == "photos" else "masks"
    assert steps["causal/trained"].config.data.root == str(root)
    if layout == "ade20k":  # Fig. 11 of the paper
        classes = {"sky", "ceiling", "grass"}
        assert classes <= {*steps["causal/trained/knockout"].config.classes}
        assert classes <= {*ade20k.CLASSES}


@pytest.fixture
def study(tmp_path):
    """Return a function that runs slurm/six_configurations.sh with a fake sbatch, which records its calls, and a fake
    squeue, which prints the file `queue`. It returns the finished process and the calls as lists of words."""
    commands = {
        "sbatch": f'echo "$@" >> {tmp_path}/calls; wc -l < {tmp_path}/calls',
        "squeue": f"cat {tmp_path}/queue",
    }
    (tmp_path / "bin").mkdir()
    (tmp_path / "queue").touch()
    for name, line in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*arguments, check=True, **settings):
        (tmp_path / "calls").unlink(missing_ok=True)
        there = dict.fromkeys(DATA, str(tmp_path)) | {"RUNS": str(tmp_path / "runs")}
        path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        script = ROOT / "slurm/six_configurations.sh"
        variables = os.environ | path | there | settings
        done = run_command([script, *arguments], must_pass=check, env=variables, cwd=tmp_path)
        calls = (
            (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        )
        return done, [call.split() for call in calls]

    return run


def planned(done) -> dict[str, list[str]]:
    """Return the printed words of each job by its name; GPU hours follow after an empty line."""
    _, *lines = done.stdout.partition("\n\n")[0].splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_dry_run_prints_every_job_with_its_dependencies_and_submits_none(study):
    done, calls = study("--dry-run", CAPTIONS="/nowhere")
    expected = {}
    runs = [f"{encoder}-{mask}" for encoder in ("clip", "dinov2", "siglip") for mask in MASKS]
    for run in runs:
        after = ["after", f"{run}/stage2"]
        arms = ["--arms", *ARMS, "--only", "solve", "fit", "knockout"]
        words = run.split("-")
        expected |= {
            f"{run}/stage1": ["slurm/stage1.sbatch", *words],
            f"{run}/stage2": ["slurm/stage2.sbatch", *words, "after", f"{run}/stage1"],
            f"{run}/study": ["slurm/study.sbatch", *words, *arms, *after],
            f"{run}/vqa": ["slurm/vqa.sbatch", *words, *after],
        }
    for encoder in ("clip", "dinov2", "siglip"):
        after = ["after", *(f"{encoder}-{mask}/study" for mask in MASKS)]
        words = [encoder, *MASKS, "--only", "starvation", "report", *after]
        expected[f"{encoder}/report"] = ["slurm/study.sbatch", *words]
    expected["table1/table1"] = ["slurm/table1.sbatch", "after", *(f"{run}/vqa" for run in runs)]
    assert planned(done) == expected
    assert calls == []
    assert all((ROOT / words[0]).is_file() for words in expected.values())


def test_a_study_split_by_arm_solves_controls_after_the_trained_model(study):
    """Controls block the classes that the trained model confuses most."""
    done, _ = study(
        "--dry-run",
        SPLIT="yes",
        ENCODERS="clip",
        MASKS="causal",
        VQA_PYTHON="",
        ARMS=" ".join(sorted(ARMS, reverse=True)),  # the trained one not first
    )
    jobs = planned(done)
    needed = dict.fromkeys(ARMS, "clip-causal/study-trained") | {"trained": "clip-causal/stage2"}
    for arm in ARMS:
        words = jobs[f"clip-causal/study-{arm}"]
        assert words[3:5] == ["--arms", arm]
        assert words[-1] == needed[arm]
    assert set(jobs["clip/report"][-len(ARMS) :]) == {f"clip-causal/study-{arm}" for arm in ARMS}


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "message"),
    [
        (["--dry-run", "7b"], {}, 2, "usage: "),
        ([], {"CAPTIONS": "/nowhere/a.json"}, 1, "CAPTIONS=/nowhere/a.json does not exist\n"),
    ],
)
def test_a_mistake_submits_nothing(
    arguments,
    settings,
    code,
    message,
    study,
):
    done, calls = study(*arguments, check=False, **settings)
    assert done.returncode == code
    assert calls == []
    assert message in done.stderr


def test_jobs_have_their_dependencies_and_resources(study, tmp_path):
    cluster = {
        "NODES": "2",
        "TASKS_PER_NODE": "4",
        "GRES": "gpu:h100",
    }
    _, calls = study(
        ENCODERS="clip",
        PARTITION="fast",
        ACCOUNT="me",
        **cluster,
    )
    waits = []
    for call in calls:
        waits += [[w.partition(":")[2] for w in call if w.startswith("--dependency=afterok")]]
    # stages, study and benchmarks of both masks; the report, the table
    assert waits == [[], ["1"], ["2"], ["2"], [], ["5"], ["6"], ["6"], ["3:7"], ["4:8"]]
    resources = {
        1: {"--account=me", "--partition=fast", "--nodes=2", "--ntasks-per-node=4"},
        2: {"--nodes=1", "--ntasks-per-node=1", "--gres=gpu:h100:4", "--cpus-per-task=32"},
        3: {"--nodes=1", "--ntasks-per-node=1", "--gres=gpu:h100:4", "--cpus-per-task=32"},
        8: {"--nodes=1", "--ntasks-per-node=1", "--gres=gpu:h100:1"},
    }
    for number, words in resources.items():
        assert words <= set(calls[number])
    training = calls[1]
    assert training[-3:] == ["slurm/stage2.sbatch", "clip", "causal"]
    assert f"--output={tmp_path}/runs/clip-causal/logs/stage2.log" in training
    assert (tmp_path / "runs/clip-causal/logs").is_dir(), "Slurm does not create folders for logs"


def test_finished_parts_and_queued_jobs_are_skipped(study, tmp_path):
    runs = tmp_path / "runs"
    for name in ("stage1/hf", "study-random0.done", "study-random1.done"):
        (runs / "clip-causal" / name).mkdir(parents=True)
    # that of random1 was deleted, to be made again
    (runs / "clip/causal/random0").mkdir(parents=True)
    (runs / "clip/causal/random0/metrics.json").touch()
    queue = [
        f"41 {ROOT}/{runs}/clip-causal/stage2",
        "42 /elsewhere/clip-causal/study",
        f"43 {ROOT}/study",
    ]
    (tmp_path / "queue").write_text("\n".join(queue) + "\n")
    here = {
        "ENCODERS": "clip",
        "MASKS": "causal",
        "VQA_PYTHON": "",
    }
    done, calls = study(
        **here,
        SPLIT="yes",
        ARMS="trained random0 random1",
    )
    assert [" ".join(call[call.index("slurm/study.sbatch") + 1 :]) for call in calls] == [
        "clip causal --arms trained --only solve fit knockout",
        "clip causal --arms random1 --only solve fit knockout",
        "clip causal --only starvation report",
    ]
    assert {"--dependency=afterok:41", "--kill-on-invalid-dep=yes"} <= set(calls[0])
    assert "clip-causal/stage1                   slurm/stage1.sbatch clip causal" in done.stdout


def test_dry_run_of_a_rehearsal_prints_its_plan_and_writes_nothing(study, tmp_path):
    done, calls = study("--rehearse", "--dry-run", PYTHON="/nowhere/python", ENCODERS="dinov2 clip")
    arms = ["--arms", *REHEARSED_ARMS.split(), "--only", "solve", "fit", "knockout"]
    plan = planned(done)
    assert plan["dinov2-causal/study"][: len(arms) + 3] == [
        "slurm/study.sbatch",
        "dinov2",
        "causal",
        *arms,
    ]
    assert not any(name.startswith("clip") for name in plan)
    assert calls == []
    assert not (tmp_path / "runs").exists()


def hours(done) -> list[list[str]]:
    """Return the words of each line about GPU hours."""
    return [line.split() for line in done.stdout.partition("\n\n")[2].splitlines()]


@pytest.mark.slow
def test_the_plan_has_the_gpu_hours_at_a_stated_mfu(study, parts, tmp_path):
    """Six operations per token and weight that trains, four per frozen weight; other operations are few here."""
    encoder, _ = parts
    (tmp_path / "clip.yaml").write_text(
        json.dumps({"model": {"encoder": {"name": "clip", "path": encoder.path, "layer": -1}}})
    )
    llm = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    llm.save_pretrained(tmp_path / "llm")
    weights = 4 * (4 * 512**2 + 3 * 512 * 4096)
    (tmp_path / "runs/clip-causal/stage1/hf").mkdir(parents=True)
    settings = {
        "PYTHON": sys.executable,
        "ENCODERS": "clip",
        "ENCODER_CONFIGS": str(tmp_path),
        "LLM": str(tmp_path / "llm"),
        "REHEARSAL": "/nowhere",
        "MFU": "0.5",
        "PEAK_TFLOPS": "0.001",
        "TEXT_TOKENS": "6 16",
    }
    done, _ = study("--dry-run", **settings)
    assumption, *jobs, total = hours(done)
    text = (
        "GPU hours, at an MFU of 0.5 of 0.001 TFLOP/s, and 6 text tokens a caption, 16 a dialogue:"
    )
    assert " ".join(assumption) == text
    names = ["clip-causal/stage2", "clip-bidirectional/stage1", "clip-bidirectional/stage2"]
    assert [job[0] for job in jobs] == names, "but those that are finished"
    of_stage = {"stage1": 558_128 * 4 * (4 + 6), "stage2": 665_298 * 6 * (4 + 16)}
    for name, found, wall, *_ in jobs:
        expected = of_stage[name.rpartition("/")[2]] * weights / (0.5 * 1e9) / 3600
        assert float(found) == pytest.approx(expected, rel=0.02)
        assert float(wall) == pytest.approx(float(found) / 8, abs=0.06)
    assert float(total[1]) == pytest.approx(sum(float(job[1]) for job in jobs), rel=1e-4)


def test_the_plan_has_the_gpu_hours_of_a_rehearsal(study, tmp_path):
    cost = [{"part": "causal_stage2", "device_hours": 40.25, "assumes": ""}]
    cost += [{"part": "probes", "device_hours": 3.0, "assumes": ""}]
    record = {"size": "7b", "encoder": "clip", "devices": ["NVIDIA H100"] * 8, "cost": cost}
    (tmp_path / "rehearsal.json").write_text(json.dumps(record))
    there = {"PYTHON": sys.executable, "REHEARSAL": str(tmp_path / "rehearsal.json")}
    done, _ = study("--dry-run", ENCODERS="clip", **there)
    assumption, job, _ = hours(done)
    assert " ".join(assumption).startswith(
        f"GPU hours, at the speed of {tmp_path}/rehearsal.json: 7b"
    )
    assert job[:2] == ["clip-causal/stage2", "40.2"]


def test_unknown_gpu_hours_say_how_to_know_them(study, tmp_path):
    done, _ = study("--dry-run", REHEARSAL="/nowhere/x.json")
    (words,) = hours(done)
    assert " ".join(words).startswith("GPU hours: unknown. `probes rehearse --out /nowhere` measur")
    done, _ = study("--dry-run", REHEARSAL="/nowhere", MFU="0.4", PYTHON="/nowhere/python")
    (words,) = hours(done)
    assert "PYTHON=/nowhere/python does not exist; `make venv`" in " ".join(words)
    done, _ = study("--dry-run", REHEARSAL="/nowhere", MFU="40", PYTHON=sys.executable)
    (words,) = hours(done)
    assert "MFU=40.0 must be a share of the peak" in " ".join(words)


def test_a_rehearsal_without_packages_or_slurm_says_so_and_writes_nothing(study, tmp_path):
    """It had written 30 GB before."""
    (tmp_path / "bin/other-python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/other-python").chmod(0o755)
    done, _ = study("--rehearse", check=False, PYTHON="other-python")
    assert done.stderr == (
        "slurm/env.sh: PYTHON=other-python has no llava-bidir; `make venv` makes an environment\n"
    )
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\nexit 1\n")
    done, _ = study("--rehearse", check=False, PYTHON=sys.executable)
    assert done.stderr.startswith("Slurm does not answer to squeue: submit jobs on a cluster's lo")
    assert not (tmp_path / "runs").exists()


def test_all_that_is_missing_is_named_at_once(study):
    missing = {"PYTHON": "/nowhere/python", "CAPTIONS": "/nowhere/a.json"}
    done, calls = study(check=False, **missing)
    assert done.stderr.splitlines() == [
        "slurm/env.sh: PYTHON=/nowhere/python does not exist; `make venv` makes it",
        "slurm/env.sh: CAPTIONS=/nowhere/a.json does not exist",
    ]
    assert calls == []
    done, calls = study("--rehearse", check=False, PYTHON="/nowhere/python")
    assert done.stderr.splitlines() == [
        "slurm/env.sh: PYTHON=/nowhere/python does not exist; `make venv` makes it"
    ]


@pytest.mark.slow
def test_rehearsal_submits_the_study_on_random_weights(study, tmp_path):
    """The inputs are written first; jobs get them, and few steps, as variables that take precedence over env.sh."""
    recorded = f'echo "$@" >> {tmp_path}/calls; env > {tmp_path}/env; wc -l < {tmp_path}/calls\n'
    (tmp_path / "bin/sbatch").write_text(f"#!/bin/sh\n{recorded}")
    there = {
        "PYTHON": sys.executable,
        "SIZE": "tiny",
        "VQA_PYTHON": "/nowhere/python",
        "PYTHONPATH": str(ROOT),
        "LAYOUT": "voc2012",
        "STUDY": "-c voc2012",
    }
    done, calls = study("--rehearse", **there, ENCODERS="dinov2 clip")
    scripts = [next(word for word in call if word.startswith("slurm/")) for call in calls]
    assert len(scripts) == 2 * 3 + 1
    assert scripts.count("slurm/study.sbatch") == 3
    assert "no benchmarks: /nowhere/python does not exist" in done.stdout
    jobs = dict(
        line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line
    )
    folder = tmp_path / "runs/rehearsal"
    assert jobs["RUNS"] == str(folder)
    assert jobs["LLM"] == f"{folder}/inputs/vicuna"
    assert jobs["ENCODERS"] == "dinov2"
    assert jobs["STAGE2"] == "-c configs/stage2.yaml --trainer.max_steps 2"
    assert jobs["LAYOUT"] == "ade20k" and jobs["STUDY"] == STUDY, "whatever the study's dataset is"
    config = json.loads((folder / "inputs/dinov2.yaml").read_text())
    assert Path(config["model"]["encoder"]["path"]).is_dir()
    assert Path(jobs["CAPTIONS"]).is_file()
