"""Photos that a solved run keeps for the report."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from solving import arguments

from probes.cli import main
from probes.runs.pictures import choose_photos, names_of, read_pictures, shown_photos
from probes.runs.read import ProbeRun


@pytest.fixture(scope="module")
def runs(checkpoints, segmentation, tmp_path_factory) -> list[ProbeRun]:
    """Two models, solved one after the other."""
    folder = tmp_path_factory.mktemp("study")
    finished_runs = []
    for mask in ("causal", "bidirectional"):
        main(arguments(checkpoints[mask], segmentation, folder / mask / "trained"))
        finished_runs.append(ProbeRun(folder / mask / "trained"))
    return finished_runs


def test_maps_are_what_the_runs_probes_predict(runs):
    run = runs[1]
    saved_pictures = read_pictures(run.path)
    assert saved_pictures["sites"].tolist() == run.sites
    for name in names_of(saved_pictures):
        sample = run.dataset()[int(saved_pictures[f"{name}/index"])]
        np.testing.assert_array_equal(saved_pictures[f"{name}/truth"], sample["target"])
        predicted = np.stack([*run.predict_sites(sample["image"], run.sites)])
        np.testing.assert_array_equal(saved_pictures[f"{name}/maps"], predicted)


def test_the_second_model_shows_the_photos_of_the_first(runs):
    second = read_pictures(runs[1].path)
    best = np.argmax([site["miou"] for site in runs[0].metrics["sites"]])
    chosen = choose_photos(runs[0].counts._asdict(), int(best))
    assert {name: int(second[f"{name}/index"]) for name in names_of(second)} == chosen
    assert shown_photos(Path("run"), "") == {}, "beside no other model"


def test_damaged_photos_are_left_out_and_named(runs, tmp_path):
    """A run beside it whose disk was full ended every other run of the study."""
    for mask, model in zip(("a", "b"), runs, strict=True):
        (tmp_path / mask / "trained").mkdir(parents=True)
        content = (model.path / "pictures.npz").read_bytes()
        kept = len(content) // 2 if mask == "a" else len(content)
        (tmp_path / mask / "trained/pictures.npz").write_bytes(content[:kept])
    whole = read_pictures(tmp_path / "b/trained")
    with pytest.warns(UserWarning, match="a/trained/pictures.npz: .*; its photos are left out"):
        shown = shown_photos(tmp_path / "c/trained", str(whole["data"]))
    assert shown == {name: int(whole[f"{name}/index"]) for name in names_of(whole)}


def test_photos_that_cannot_be_written_whole_are_not_there(
    checkpoints, segmentation, tmp_path, monkeypatch
):
    def fill_the_disk(file, **_) -> None:
        file.write(b"PK")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fill_the_disk)
    with pytest.raises(SystemExit, match="pictures.npz.*No space left on device"):
        main(arguments(checkpoints["causal"], segmentation, tmp_path / "run"))
    assert not list(tmp_path.rglob("pictures.npz*"))


@pytest.mark.parametrize("images", [1, 2, 40])
def test_photos_are_chosen_by_quantile_each_once(images):
    right = torch.randperm(images)
    labelled = torch.full((images, 1), images)
    counted = {"intersection": right[None, :, None], "labelled": labelled}
    chosen = choose_photos(counted, 0)
    assert len({*chosen.values()}) == len(chosen) == min(3, images)
    for name, index in chosen.items():
        share = {"typical": 0.5, "easy": 0.9, "hard": 0.1}[name]
        assert right[index] == round(share * (images - 1))
