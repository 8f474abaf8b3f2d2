"""Untrusted probe runs: damaged files are named, and names in them are shown as text, never executed."""

import json
import shutil
import subprocess
from pathlib import Path

import probe_runs
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from probes.cli import main
from probes.runs import write
from probes.runs.read import ProbeRun

QUALITY = [0.6, 0.5, 0.55, 0.7, 0.65, 0.65]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"{{ 7*7 }}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tiny_models.write_segmentation(tmp_path_factory.mktemp("data"))
    return probe_runs.write_run(
        tmp_path_factory.mktemp("runs") / "run", QUALITY, root=root, encoder="clip"
    )


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def rewrite(file: Path, *keys, value) -> None:
    """Set facts[keys[0]][keys[1]]... to `value`."""
    facts = json.loads(file.read_text())
    inner = facts
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(facts))


@pytest.mark.parametrize("file", ["metrics.json", "manifest.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"a":' + b"[" * 100_000, None])
def test_damaged_or_missing_json_is_named(file, content, run):
    (run / file).unlink() if content is None else (run / file).write_bytes(content)
    with pytest.raises(ValueError, match=file):
        ProbeRun(run)


def test_weights_that_are_not_finite_are_named_by_whatever_reads_the_run(run, tmp_path):
    probes = {f"{site}.head.weight": torch.zeros(3, 2) for site in ProbeRun(run).sites}
    probes["layer_02.head.weight"][1, 1] = torch.nan
    save_file(probes, run / "probes.safetensors")
    with pytest.raises(ValueError, match=r"probes.safetensors: layer_02.head.weight is not finite"):
        ProbeRun(run).probes()
    with pytest.raises(SystemExit, match="layer_02.head.weight is not finite"):
        main(["report", str(run.parent), "--out", str(tmp_path / "report")])


def add_tensor(file: Path) -> None:
    save_file(load_file(file) | {"group": torch.zeros(40, dtype=torch.long)}, file)


CHANGES = {
    "metrics.json": (lambda file: rewrite(file, "images", value=41), lambda run: run),
    "counts.safetensors": (add_tensor, lambda run: run.counts),
    "probes.safetensors": (add_tensor, lambda run: run.probes()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_has_changed_since_the_run_is_named(name, run, tmp_path):
    save_file({"encoder.head.weight": torch.zeros(3, 16)}, run / "probes.safetensors")
    probe_runs.record_hashes(run)
    change, read = CHANGES[name]
    change(run / name)
    with pytest.raises(ValueError, match=f"{name} is not the file that the run wrote"):
        read(ProbeRun(run))
    with pytest.raises(SystemExit, match=f"^probes: .*{name} is not the file that the run wrote"):
        main(["report", str(run.parent), "--out", str(tmp_path / "report")])


def test_names_of_a_run_are_text_in_the_report(run, tmp_path):
    """Of classes, the dataset, the model, and the mask; and none is a path to write to."""
    rewrite(run / "metrics.json", "classes", value=[EVIL, "wall", "road"])
    for keys in (["baseline", "class"], ["dataset"], ["mllm"], ["image_attention"]):
        rewrite(run / "metrics.json", *keys, value=EVIL + "/../../../up")
    for keys in (["mllm_training", "encoder", "name"], ["mllm_training", "llm"]):
        rewrite(run / "manifest.json", *keys, value=EVIL)
    before = {path for path in tmp_path.rglob("*") if tmp_path / "evil" not in path.parents}
    main(["report", str(run.parent), "--out", str(tmp_path / "evil")])
    html = (tmp_path / "evil/index.html").read_text()
    assert "alert(1)" in html
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert "{{ 7*7 }}" in html
    after = {path for path in tmp_path.rglob("*") if tmp_path / "evil" not in path.parents}
    assert after - before == {tmp_path / "evil"}, "nothing was written elsewhere"


def test_analysis_of_other_probes_is_refused(run):
    """As after another training in the same folder."""
    run = ProbeRun(run)
    assert run.analysis("umap.json") is None
    (run.path / "umap.json").write_text(json.dumps({"runs": [run.fingerprint]}))
    assert run.analysis("umap.json")
    save_file({"other": torch.ones(3)}, run.path / "probes.safetensors")
    with pytest.raises(ValueError, match="umap.json was made from other probes than"):
        ProbeRun(run.path).analysis("umap.json")


def test_the_recorded_commit_is_that_of_this_code(tmp_path, monkeypatch):
    """Not of another repository around it, as where a wheel is installed into a project's environment."""
    git = f"git -C {tmp_path} -c user.name=x -c user.email=x".split()
    for command in (["init", "-q"], "commit -q -m x --allow-empty".split()):
        subprocess.run([*git, *command], check=True)
    for folder, expected in (("site-packages/probes/solve", False), ("probes/solve", True)):
        (tmp_path / folder).mkdir(parents=True)
        monkeypatch.setattr(write, "__file__", str(tmp_path / folder / "write.py"))
        assert bool(write._git_commit()) == expected
    monkeypatch.setenv("PATH", str(tmp_path / "site-packages"))
    assert write._git_commit() is None, "no git is installed, as in a slim container"
