"""The paper's numbers, and the runs that may be compared with them."""

import json
from pathlib import Path
from typing import Any

from probes.models.sites import ADAPTER, ENCODER, layer_site

from .probe_run import ProbeRun

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())

SHAPES = {"clip": (1024, 24), "dinov2": (1024, 24), "siglip": (1152, 27)}  # encoder width, grid side (App. A.1)
STOCK = {"llava-1.5-7b-hf": "clip"}  # released checkpoints in a configuration of the paper
PROBE = {"head": "linear", "feature_norm": "none", "learning_rate": 1e-3, "batch_size": 64, "epochs": 20}  # App. A.2


def paper_encoder(run: ProbeRun) -> str | None:
    """Return the encoder of the paper's configuration that a run repeats; None if the numbers are not comparable.

    A comparable run is trained and has the paper's encoder, the shape of Vicuna-7B, probes at all 32 layers, the full
    ADE20K validation set with 150 classes, and the mask that the model was trained with.
    """
    metrics, training = run.metrics, run.training
    name = training.get("encoder", {}).get("name") or STOCK.get(Path(metrics["mllm"]).name)
    if name not in SHAPES or metrics["untrained"]:
        return None
    width, side = SHAPES[name]
    dims = {entry["site"]: entry["dim"] for entry in metrics["sites"]}
    layers = {layer_site(layer) for layer in range(1, 33)}
    comparable = (
        metrics["dataset"].lower() == "ade20k"
        and metrics["images"] == 2000
        and len(metrics["classes"]) == 150
        and metrics["grid"] == [side, side]
        and (dims.get(ENCODER), dims.get(ADAPTER)) == (width, 4096)
        and {site for site in dims if site.startswith("layer_")} == layers
        and metrics["image_attention"] in PAPER["table2_ade20k_miou"][name]
        and metrics.get("own_image_attention") in (None, metrics["image_attention"])
    )
    return name if comparable else None


def probe_deviations(run: ProbeRun) -> dict[str, Any]:
    """Return the probe settings that differ from App. A.2, with the run's values; solved probes have only some."""
    settings = {"head": "linear"} | run.metrics["probe"]
    solved = {"solved": settings["solved"]} if "solved" in settings else {}
    return solved | {key: settings[key] for key in PROBE if key in settings and settings[key] != PROBE[key]}
