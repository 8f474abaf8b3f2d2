"""Cost of the real study, from the speed of a rehearsal and the FLOPs that `llava-bidir estimate` counts."""

import json
from pathlib import Path
from typing import Any

from .inputs import STEPS
from .study import MASKS, STAGES

# Samples of a stage. Source: LLaVA, blip_laion_cc_sbu_558k.json and llava_v1_5_mix665k.json.
RECORDS = {"stage1": 558_128, "stage2": 665_298}
# Images that `probes fit` passes through the model. Source: ADE20K, paper App. A.2: 20 epochs, each with validation.
PROBED_IMAGES = 20 * (20_210 + 2_000)


def read_estimate(log: Path) -> dict[str, Any]:
    """Return the JSON object that `llava-bidir estimate --json` printed as a line of a log; warnings may follow it."""
    return json.loads([line for line in log.read_text().splitlines() if line.startswith("{")][-1])


def extrapolate(steps: dict[str, dict[str, Any]], logs: Path, devices: int) -> list[dict[str, Any]]:
    """Return hours of the real run per stage and mask, and of its probes, at the speed of the rehearsal.

    Args:
        steps: Measurements by name of the step.
        logs: Folder with the logs of the estimates.
        devices: Devices of the rehearsal, all of which the probes use.

    Returns:
        For each part that was measured {"part", "device_hours", "assumes"} and, of stages, {"devices",
        "estimate_memory_gb", "estimate_step_flops"}.
    """
    parts = []
    for mask in MASKS:
        for stage in STAGES:
            speed, log = steps.get(f"{mask}_{stage}", {}), logs / f"estimate_{stage}.log"
            if speed.get("tflops_per_s_and_device") and steps.get(f"estimate_{stage}", {}).get("status") == "finished":
                parts.append({"part": f"{mask}_{stage}", **_stage_cost(stage, speed, read_estimate(log))})
    speed = steps.get("study", {})
    if "step_s" in speed:
        hours = devices * PROBED_IMAGES * speed["step_s"] / speed["samples"] / 3600
        assumes = f"per mask; {PROBED_IMAGES:,} images through the model, as slow as training images of the rehearsal, "
        assumes += f"which has {speed['samples']} a step and on a CPU reads few of their labels; the real run reads all"
        parts.append({"part": "probes", "device_hours": round(hours, 2), "assumes": assumes})
    return parts


def _stage_cost(stage: str, speed: dict[str, Any], estimate: dict[str, Any]) -> dict[str, Any]:
    flops = RECORDS[stage] / estimate["batch_size"] * estimate["step_flops"]
    hours = flops / (speed["tflops_per_s_and_device"] * 1e12) / 3600
    return {
        "device_hours": round(hours, 2),
        "assumes": f"{RECORDS[stage]:,} samples of {estimate['length']} tokens (data.max_length), training all that "
        f"configs/{stage}.yaml trains, at the FLOP/s per device of {STEPS - 1} step of the rehearsal; no saving or "
        "validation",
        "devices": estimate["devices"],
        "estimate_step_flops": estimate["step_flops"],
        "estimate_memory_gb": estimate["memory_gb"],
    }
