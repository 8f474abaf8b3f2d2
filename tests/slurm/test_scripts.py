"""The job scripts without Slurm: the plan of the study, and the calls of a fake `sbatch`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from probes.data import ade20k

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch")])
STAGES = ["stage1", "stage2", "probes"]
KNOCKED = ("solved", "random0", "random1")
DATA = ["PYTHON", "VQA_PYTHON", "CAPTIONS", "CAPTION_IMAGES", "INSTRUCTIONS", "INSTRUCTION_IMAGES", "SEGMENTATION"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        check = subprocess.run(["shellcheck", "-x", path], cwd=ROOT, capture_output=True, text=True)
        assert check.returncode == 0, check.stdout


@pytest.mark.parametrize("dataset", ["ade20k", "voc2012", "cityscapes"])
def test_probes_job_takes_each_dataset(dataset, tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    there = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "1", "SEGMENTATION": "masks", "RUNS": "runs"}
    config = f"configs/probes/{dataset}.yaml"
    there |= {"PROBES": f"-c {config}"} if dataset != "ade20k" else {}  # the default
    job = ["bash", "slurm/probes.sbatch", "clip", "causal", "--out", "elsewhere"]
    done = subprocess.run(job, cwd=ROOT, env=os.environ | there, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    assert words[words.index("-c") + 1] == config and (ROOT / config).is_file()
    assert words[words.index("--data.root") + 1] == "masks" and words[-2:] == ["--out", "elsewhere"]


@pytest.mark.parametrize(
    ("name", "control"),
    [
        ("solved", []),
        ("random1", ["-c", "configs/probes/matched.yaml", "--model.draw", "1"]),
        ("adapter0", ["--model.untrained", "[adapter]", "--model.sites", "[encoder, adapter]", "--model.draw", "0"]),
    ],
)
def test_solve_job_makes_the_control_of_its_name(name, control, tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "srun").chmod(0o755)
    there = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "1", "RUNS": "runs", "SOLVE": "--passes 2"}
    job = ["bash", "slurm/solve.sbatch", "clip", "causal", name, "--folds", "3"]
    done = subprocess.run(job, cwd=ROOT, env=os.environ | there, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    start = words.index("configs/probes/ade20k.yaml") + 1
    assert words[start : words.index("--trainer.num_nodes")] == control
    assert words[words.index("--out") + 1] == f"runs/clip-causal/{name}" and words[-4:] == [
        "--passes",
        "2",
        "--folds",
        "3",
    ]


def test_default_knockout_is_the_papers():
    """Fig. 11: sky, ceiling and grass."""
    command = ["bash", "-c", "source slurm/env.sh; echo $KNOCKOUT"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    option, *classes = done.stdout.split()
    assert option == "--classes" and set(classes) == {"sky", "ceiling", "grass"} <= set(ade20k.CLASSES)


@pytest.fixture
def study(tmp_path):
    """Return a function that runs slurm/six_configurations.sh with a fake sbatch, which records its calls, and a fake
    squeue, which prints the file `queue`. It returns the finished process and the calls as lists of words."""
    commands = {"sbatch": f'echo "$@" >> {tmp_path}/calls; wc -l < {tmp_path}/calls', "squeue": f"cat {tmp_path}/queue"}
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
        done = subprocess.run(
            [script, *arguments], env=os.environ | path | there | settings, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 or not check, done.stderr
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done, [call.split() for call in calls]

    return run


def test_dry_run_prints_every_job_with_its_dependencies_and_submits_none(study):
    done, calls = study("--dry-run", CAPTIONS="/nowhere")
    assert calls == [] and len(done.stdout.splitlines()) == 1 + 6 * (4 + 5 + 4) + 3 + 1
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[1:]}
    for encoder in ("clip", "dinov2", "siglip"):
        for mask in ("causal", "bidirectional"):
            before = None
            for stage in STAGES:
                after = ["after", before] if before else []
                before = f"{encoder}-{mask}/{stage}"
                assert lines[before] == [f"slurm/{stage}.sbatch", encoder, mask, *after]
            run = f"{encoder}-{mask}"
            assert lines[f"{run}/vqa"] == ["slurm/vqa.sbatch", encoder, mask, "after", f"{run}/stage2"]
            for name in ("solved", "random0", "random1", "adapter0", "adapter1"):
                assert lines[f"{run}/{name}"] == ["slurm/solve.sbatch", encoder, mask, name, "after", f"{run}/stage2"]
            for name in ("probes", *KNOCKED):
                assert lines[f"{run}/knockout-{name}"][1:] == [encoder, mask, name, "after", f"{run}/{name}"]
        last = [*(f"knockout-{name}" for name in ("probes", *KNOCKED)), "adapter0", "adapter1"]
        knockouts = [f"{encoder}-{mask}/{name}" for mask in ("causal", "bidirectional") for name in last]
        assert lines[f"{encoder}-report/report"] == ["slurm/report.sbatch", encoder, "after", *knockouts]
    tasks = [
        f"{encoder}-{mask}/vqa" for encoder in ("clip", "dinov2", "siglip") for mask in ("causal", "bidirectional")
    ]
    assert lines["table1/table1"] == ["slurm/table1.sbatch", "after", *tasks]
    assert all((ROOT / line[0]).is_file() for line in lines.values())


@pytest.mark.parametrize("arguments", [["--dryrun"], ["--dry-run", "7b"], ["--help"]])
def test_an_unknown_argument_submits_nothing(study, arguments):
    done, calls = study(*arguments, check=False)
    assert done.returncode == 2 and calls == [] and "usage: " in done.stderr


def test_jobs_have_their_dependencies_and_resources(study, tmp_path):
    _, calls = study(ENCODERS="clip", NODES="2", TASKS_PER_NODE="4", GRES="gpu:h100", PARTITION="fast", ACCOUNT="me")
    waits = [[word.partition("=")[2] for word in call if word.startswith("--dependency")] for call in calls]
    mask = lambda n: (
        [[], [f"afterok:{n + 1}"], *[[f"afterok:{n + 2}"]] * 6] + [[f"afterok:{n + of}"] for of in (3, 4, 5, 6, 2)]
    )  # stages; probes, solved and controls; knockouts of probes, solved and random LLMs; benchmarks
    last = [n + of for n in (0, 13) for of in (9, 10, 11, 12, 7, 8)]
    assert waits == [*mask(0), *mask(13), ["afterok:" + ":".join(map(str, last))], ["afterok:13:26"]]
    training, language, report = calls[1], calls[12], calls[26]
    assert {"--nodes=1", "--ntasks-per-node=1", "--gres=gpu:h100:4", "--cpus-per-task=32"} <= {*language}
    assert {"--account=me", "--partition=fast", "--nodes=2", "--ntasks-per-node=4", "--gres=gpu:h100:4"} <= {*training}
    assert training[-3:] == ["slurm/stage2.sbatch", "clip", "causal"]
    assert f"--output={tmp_path}/runs/clip-causal/logs/stage2.log" in training
    assert (tmp_path / "runs/clip-causal/logs").is_dir(), "Slurm does not create folders for logs"
    assert {"--nodes=1", "--ntasks-per-node=1", "--gres=gpu:h100:1"} <= {*report}


def test_empty_gres_requests_no_gpus(study):
    _, calls = study(ENCODERS="clip", GRES="")
    assert not any(word.startswith(("--gres", "--account", "--partition")) for call in calls for word in call)


def test_finished_parts_and_queued_jobs_are_skipped(study, tmp_path):
    runs = tmp_path / "runs"
    (runs / "clip-causal/stage1/hf").mkdir(parents=True)
    queue = {41: f"{ROOT}/{runs}/clip-causal/stage2", 42: "/elsewhere/clip-causal/probes", 43: f"{ROOT}/probes"}
    (tmp_path / "queue").write_text("".join(f"{number} {name}\n" for number, name in queue.items()))
    done, calls = study(ENCODERS="clip", MASKS="causal", VQA_PYTHON="", DRAWS="")
    scripts = [next(word for word in call if word.startswith("slurm/")) for call in calls]
    assert scripts == [f"slurm/{name}.sbatch" for name in ("probes", "solve", "knockout", "knockout", "report")]
    assert "--dependency=afterok:41" in calls[0] and "--kill-on-invalid-dep=yes" in calls[0]
    assert "clip-causal/stage1                   slurm/stage1.sbatch clip causal" in done.stdout


def test_missing_data_is_an_error_before_anything_is_submitted(study):
    done, calls = study(check=False, CAPTIONS="/nowhere/captions.json")
    assert done.returncode == 1 and calls == []
    assert done.stderr == "slurm/env.sh: CAPTIONS=/nowhere/captions.json does not exist\n"


@pytest.mark.slow
def test_rehearsal_submits_the_study_on_random_weights(study, tmp_path):
    """The inputs are written first; jobs get them, and few steps, as variables that take precedence over env.sh."""
    recorded = f'echo "$@" >> {tmp_path}/calls; env > {tmp_path}/env; wc -l < {tmp_path}/calls\n'
    (tmp_path / "bin/sbatch").write_text(f"#!/bin/sh\n{recorded}")
    there = {"PYTHON": sys.executable, "SIZE": "tiny", "VQA_PYTHON": "/nowhere/python", "PYTHONPATH": str(ROOT)}
    there |= {"PROBES": "-c configs/probes/voc2012.yaml"}
    done, calls = study("--rehearse", **there, ENCODERS="dinov2 clip")
    scripts = [next(word for word in call if word.startswith("slurm/")) for call in calls]
    assert len(scripts) == 2 * 12 + 1 and scripts.count("slurm/solve.sbatch") == 10
    assert "no benchmarks: /nowhere/python does not exist" in done.stdout
    jobs = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    folder = tmp_path / "runs/rehearsal"
    assert jobs["RUNS"] == str(folder) and jobs["LLM"] == f"{folder}/inputs/vicuna" and jobs["ENCODERS"] == "dinov2"
    assert jobs["STAGE2"] == "-c configs/stage2.yaml --trainer.max_steps 2"
    assert jobs["PROBES"] == "-c configs/probes/ade20k.yaml --data.batch_size 1", "whatever the study's dataset is"
    config = json.loads((folder / "inputs/dinov2.yaml").read_text())
    assert Path(config["model"]["encoder"]["path"]).is_dir() and Path(jobs["CAPTIONS"]).is_file()
