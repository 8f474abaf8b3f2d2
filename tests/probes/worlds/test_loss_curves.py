"""Curves in the CSV file are those that TensorBoard's logger was given."""

import csv

from lightning.pytorch.loggers import TensorBoardLogger

from probes.worlds.loss_curves import write_loss_curves


def log(folder, losses: dict[int, float]) -> None:
    """Write the events of one process."""
    logger = TensorBoardLogger(folder, name="", version="")
    for step, loss in losses.items():
        logger.log_metrics({"train/loss": loss, "train/samples_per_s": 1.0}, step)
    logger.finalize("success")


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path):
    log(tmp_path / "run", {1: 4.0, 2: 3.0, 3: 2.5})
    log(tmp_path / "run", {3: 2.75, 4: 2.0})
    log(tmp_path / "other", {1: 1.0})
    runs = {"first": tmp_path / "run", "second": tmp_path / "other", "none": tmp_path / "absent"}
    write_loss_curves(tmp_path / "curves.csv", runs)
    with (tmp_path / "curves.csv").open(newline="") as file:
        rows = [
            (row["training"], int(row["step"]), row["name"], float(row["value"]))
            for row in csv.DictReader(file)
        ]
    assert rows == [
        ("first", 1, "loss", 4.0),
        ("first", 2, "loss", 3.0),
        ("first", 3, "loss", 2.75),
        ("first", 4, "loss", 2.0),
        ("second", 1, "loss", 1.0),
    ]
