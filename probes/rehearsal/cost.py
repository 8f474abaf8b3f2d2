"""Cost of the real study, at the speed of a rehearsal."""

from typing import Any

from .study import MASKS

# Samples of each stage. Source: LLaVA, blip_laion_cc_sbu_558k.json and llava_v1_5_mix665k.json.
RECORDS = {"stage1": 558_128, "stage2": 665_298}
# Images that `probes fit` passes through each model. Source: ADE20K, paper App. A.2: 20 epochs, each with validation.
PROBED_IMAGES = 20 * (20_210 + 2_000)
COUNTS = {f"{mask}_{stage}": count for mask in MASKS for stage, count in RECORDS.items()} | {
    "study": PROBED_IMAGES
}


def extrapolate(steps: dict[str, dict[str, Any]], devices: int) -> list[dict[str, Any]]:
    """Return {"part", "device_hours", "assumes"} of the real stages, and of the probes of a model.

    Args:
        steps: Measurements by name of the step; parts without a measured speed are left out.
        devices: Devices of the rehearsal, all of which each step uses.
    """
    parts = []
    for name, count in COUNTS.items():
        speed = steps.get(name, {})
        if "step_s" in speed:
            hours = devices * count * speed["step_s"] / speed["samples"] / 3600
            assumes = f"{count:,} samples, each as fast as those of the rehearsal, {speed['samples']} a step"
            part = "probes" if name == "study" else name
            parts.append(
                {
                    "part": part,
                    "device_hours": round(hours, 2),
                    "assumes": assumes,
                }
            )
    return parts
