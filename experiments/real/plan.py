"""How many steps `make real` trains: as many as fit into the time, by that of a step on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llava_bidir.common.files import read_json, write_files
from probes.worlds.steps import MASKS

if TYPE_CHECKING:
    from torch import Tensor

# time of a step of stage 1 in steps of stage 2: fewer tokens, and frozen weights
STAGE1_SHARE = 0.3
# steps of stage 1 per step of stage 2 with photos: 900 for 600, each of 7,079 photos once
PHOTOS_STAGE1 = 1.5
PATCH_PX = 14
WORLD_TOKENS = 330  # of a dialogue of the toy world with its picture
TEXT_TOKENS = 100  # of a conversation about photos: questions and captions, half and half
MICRO_BATCHES = 2  # of a step of stage 2, as configs/real/stage2.yaml has them


def make_plan(out: Path, minutes: float, steps: int | None, image_px: int | None) -> dict:
    """Return precision and steps of both stages, from a measured step unless OUT has a plan already.

    Args:
        out: OUT.
        minutes: Time for both stages under both masks at a time.
        steps: Steps of stage 2; None: as many as fit.
        image_px: Side of the encoder's square for photos; None: the toy world, and that of the config.
    """
    file = out / "plan.json"
    if not file.is_file():
        stage1 = 1.0
        tokens = WORLD_TOKENS
        if image_px is not None:
            stage1 = PHOTOS_STAGE1
            tokens = (image_px // PATCH_PX) ** 2 + TEXT_TOKENS
        precision, seconds = measure_step(out / "llm", tokens)
        affordable = minutes * 60 / ((1 + stage1 * STAGE1_SHARE) * seconds)
        steps = steps or max(1, round(affordable))
        plan = {"precision": precision, "steps": steps, "step_s": seconds}
        write_files({file: plan | {"stage1_steps": round(stage1 * steps)}})
    plan = read_json(file)
    print(
        f"a step of stage 2 takes {plan['step_s']:.2g} s in {plan['precision']}: "
        f"{plan['stage1_steps']} steps of stage 1, {plan['steps']} of stage 2"
    )
    return plan


def measure_step(llm: Path, tokens: int) -> tuple[str, float]:
    """Return the faster precision, by Lightning's name, and the seconds of a step of stage 2 in it.

    The precision is that in which a linear layer of the LLM is faster: on a CPU without instructions for bfloat16, a
    complete step in it takes minutes. The step's time is that of the second of two micro-batches: the CPU time of one
    thread or, on a GPU, twice the time, because two trainings share it.

    Args:
        llm: Hugging Face directory.
        tokens: Length of a dialogue with its picture.
    """
    import torch
    from transformers import AutoModelForCausalLM

    gpu = torch.cuda.is_available()
    device = "cpu"
    attention = "eager"  # as `fit` is called
    if gpu:
        device = "cuda"
        attention = "sdpa"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            llm, dtype=torch.float32, attn_implementation=attention
        ).model.to(device)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(4, tokens, model.config.hidden_size, generator=generator).to(device)
        linear = model.layers[0].mlp.up_proj
        by_precision = {
            precision: _measure(linear, inputs, precision)
            for precision in ("bf16-mixed", "32-true")
        }
        precision = min(by_precision, key=by_precision.get)

        def step(inputs_embeds):
            return model(inputs_embeds=inputs_embeds).last_hidden_state

        seconds = MICRO_BATCHES * _measure(step, inputs, precision)
        if gpu:
            seconds *= len(MASKS)
        return precision, seconds
    finally:
        torch.set_num_threads(threads)


def _measure(f: Callable[["Tensor"], "Tensor"], inputs: "Tensor", precision: str) -> float:
    """Return the seconds of the second of two forwards and backwards: CPU time, or time on a GPU."""
    import time

    import torch

    gpu = inputs.device.type == "cuda"
    clock = time.process_time
    if gpu:
        clock = time.perf_counter
    for _ in range(2):
        started = clock()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            outputs = f(inputs)
        outputs.float().square().mean().backward()
        if gpu:
            torch.cuda.synchronize()
        seconds = clock() - started
    return seconds
