"""`llava-bidir vqa`: ask a checkpoint the questions of Table 1, by lmms-eval in its own environment.

:func:`run` starts :func:`main` there; under torchrun each process answers a share of the items, and the first one
writes them to TASK.json.
"""

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from llava_bidir.command_options import VQAOptions, VQATableOptions
from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.files import exclusive_run_lock, read_json, write_files
from llava_bidir.common.hf import read_model_config
from llava_bidir.common.identity import describe_digest, model_identity

from . import table1
from .scores import BENCHMARKS, Benchmark, Item


def run(options: VQAOptions) -> None:
    """Run the tasks that are not finished, and write the table.

    Raises:
        UserError: lmms-eval failed, OUT has results of another checkpoint, or there is no folder of data.
    """
    if options.data and not options.data.is_dir():
        raise UserError(f"--data: no folder {options.data}")
    from llava_bidir.commands.generate import read_image_attention

    config = read_model_config("MODEL", options.model)
    info = {
        "model": options.model,
        "image_attention": read_image_attention(config),
        "encoder": config.vision_config.model_type.removesuffix("_vision_model"),
        "fingerprint": describe_digest(model_identity("MODEL", options.model)).split()[-1],
        "batch_size": options.batch_size,
    }
    with exclusive_run_lock(options.out):
        pending = []
        for name in options.tasks:
            file = options.out / f"{name}.json"
            if not file.exists():
                pending.append(name)
            elif read_json(file)["fingerprint"] != info["fingerprint"]:
                raise UserError(f"{file} is of another checkpoint; choose another --out")
        if pending:
            command = [options.python, "-m"]
            if options.devices > 1:
                ranks = f"--standalone --nproc-per-node {options.devices} -m"
                command += ["torch.distributed.run", *ranks.split()]
            folders = [options.out.absolute(), options.data or Path()]
            request = json.dumps([*map(str, folders), pending, info])
            ask_harness([*command, __name__, request], offline=options.data is not None)
    table1.run(VQATableOptions(results=(options.out,), out=options.out))


def ask_harness(command: list[str | Path], offline: bool) -> None:
    """Run a command with this package on its path, alone: what is installed beside it would hide lmms-eval's."""
    package = Path(__file__).parents[1]
    with TemporaryDirectory() as folder, error_context("lmms-eval, which `make vqa-venv` installs"):
        Path(folder, package.name).symlink_to(package)
        paths = [folder, os.environ.get("PYTHONPATH", folder)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        with subprocess.Popen(command, env=environment) as process:
            try:
                status = process.wait()
            finally:
                process.terminate()  # not killed: torchrun has to end its ranks
        if status:
            raise subprocess.CalledProcessError(status, command)


def main(out: str, data: str, names: list[str], info: dict) -> None:
    """Run tasks in lmms-eval's environment, and write the file of each.

    Below the working directory, a data set's name is its folder.

    Raises:
        UserError: An item has no result or several.
    """
    import torch.distributed as dist

    from .lmms_model import LlavaBidir

    model = LlavaBidir(info["model"], info["batch_size"])
    os.chdir(data)
    info |= {"dtype": str(model.model.dtype), "lmms_eval": version("lmms_eval")}
    for name in names:
        benchmark = BENCHMARKS[name]
        results = run_benchmark(benchmark, model, out)
        if results is None:
            continue
        samples = sorted(results["samples"][benchmark.task], key=lambda sample: sample["doc_id"])
        count = results["n-samples"][benchmark.task]["original"]
        if [sample["doc_id"] for sample in samples] != list(range(count)):
            raise UserError(f"{name}: {len(samples)} results are not one for each of {count} items")
        items = [to_item(benchmark, sample) for sample in samples]
        write_files({Path(out, f"{name}.json"): info | {"items": items}})
    if dist.is_initialized():  # threads of its that outlive the interpreter would abort the process
        dist.destroy_process_group()


def run_benchmark(benchmark: Benchmark, model, out: str) -> dict | None:
    """Return the results of lmms-eval with all samples, None in all processes but the first."""
    import lmms_eval.tasks
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.utils import load_yaml_config

    (file,) = Path(lmms_eval.tasks.__file__).parent.glob(f"*/{benchmark.task}.yaml")
    metrics = load_yaml_config(str(file))["metric_list"]
    # no spreadsheets for submission to a server: Excel rejects some answers
    metrics = [metric for metric in metrics if metric["metric"] != "submission"]
    # one folder only: indexing all tasks takes longer than a small task
    manager = lmms_eval.tasks.TaskManager(include_path=str(file.parent), include_defaults=False)
    return simple_evaluate(
        model=model,
        tasks=[{"task": benchmark.task, "metric_list": metrics, **benchmark.overrides}],
        task_manager=manager,
        batch_size=model.batch_size,
        bootstrap_iters=0,
        # MMMU guesses for answers it cannot parse, reproducibly only in a fixed order
        process_docs_parallel=1,
        cli_args=Namespace(output_path=f"{out}/harness", process_with_media=False),
    )


def to_item(benchmark: Benchmark, sample: dict) -> Item:
    """Convert a sample of lmms-eval."""
    doc = sample["doc"]
    unit = doc.get(benchmark.unit, sample["doc_id"])
    if benchmark.unit == "index":
        unit = int(unit) % 1_000_000  # of MMBench: without the order of a question's options
    group = None
    if benchmark.task == "mme":
        group = doc["category"]
    return {
        "item": sample["doc_id"],
        "unit": unit,
        "group": group,
        "question": sample["arguments"][0],
        "answer": sample["filtered_resps"][0],
        "target": str(doc.get("answers", sample["target"])),  # the VQA tasks' is the word "answer"
        "right": rate_answer(benchmark, sample),
    }


def rate_answer(benchmark: Benchmark, sample: dict) -> float:
    """Return the correctness of an answer, 0..1, by the rule of lmms-eval."""
    names = (column.metric for column in benchmark.columns.values())
    metric = next(sample[name] for name in names if name in sample)
    if benchmark.task == "mmmu_val":
        from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

        return evaluate_mmmu([metric])[1]["acc"]
    if benchmark.task == "mmbench_en_dev_static":
        import pandas
        from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

        row = pandas.DataFrame([metric])
        answers = {metric["index"]: metric["answer"]}
        return float(mmbench_evaluator.eval_sub_data(row, answers, static_only=True))
    if isinstance(metric, dict):
        return float(metric["score"])
    return float(metric)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
