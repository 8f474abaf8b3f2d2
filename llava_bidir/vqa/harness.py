"""What runs in the harness's environment: `python -m llava_bidir.vqa.harness REQUEST`, started by run.py.

REQUEST is JSON: {"model": checkpoint, "benchmarks": [...], "out": folder, "batch_size", "facts": {...} to be kept with
the results, "code": digest of this package's code, "local": whether the working directory holds the data: a data set
"ORG/NAME" is then read from the folder of that name instead of the hub}.

Under `torchrun` every process answers its share of the items, and the first one gathers and writes.
"""

import json
import os
import sys
import time
from argparse import Namespace
from importlib import metadata
from pathlib import Path

from llava_bidir.common.errors import UserError

from .benchmarks import BENCHMARKS, Benchmark, Item
from .result_files import ItemError, code_digest, error_file, pins, write_results


def main(request: dict) -> None:
    """Runs the benchmarks of a request one after the other, each written when it is done.

    Raises:
        Exception: Whatever went wrong; the file of errors has it in a line that names the task and the item.
    """
    out, name = Path(request["out"]), "setting up"
    try:
        check_environment(request["code"])
        from lmms_eval.models import get_model  # not before it is known to be there

        model = get_model("llava_bidir").create_from_arg_string(
            f"pretrained={request['model']}", {"batch_size": request["batch_size"]}
        )
        for name in request["benchmarks"]:
            start = time.monotonic()
            results = run(BENCHMARKS[name], model, out, request["local"])
            if results is not None:  # in the first process
                made = {"code": request["code"], "device": str(model.device), "dtype": str(model.model.dtype)}
                facts = request["facts"] | made | {"seconds": round(time.monotonic() - start, 1)}
                write_results(out, name, *collect(name, results, facts))
    except Exception as error:
        cause = error.__cause__ if type(error).__name__ == "RetryError" else error  # the harness reads data five times
        what = "" if isinstance(cause, ItemError) else f"{type(cause).__name__}: "
        error_file(out).write_text(f"{name}: {what}{str(cause).strip()}\n")
        raise


def check_environment(code: str) -> None:
    """Raises ValueError unless every package has the pinned version and this package is the caller's."""
    wrong = [
        f"{name} {found} instead of {wanted}" for name, wanted in pins().items() if (found := _version(name)) != wanted
    ]
    if wrong:
        raise UserError(f"the harness's environment has {', '.join(wrong)}; make it anew with `make vqa-venv`")
    if code != code_digest():
        raise UserError(
            f"the harness's environment has another llava_bidir, in {Path(__file__).parents[1]}; `make vqa-venv` here"
        )


def _version(package: str) -> str | None:
    """Without the local part, which says what torch was built for."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def run(benchmark: Benchmark, model, out: Path, local: bool) -> dict | None:
    """The harness's results with all samples; None in all processes but the first."""
    import lmms_eval.tasks
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.utils import load_yaml_config

    here, harness = f"tasks/{benchmark.task}.yaml", f"*/{benchmark.task}.yaml"
    (path,) = [*Path(__file__).parent.glob(here), *Path(lmms_eval.tasks.__file__).parent.glob(harness)]
    config = load_yaml_config(str(path))
    if local and "/" in config["dataset_path"] and not Path(config["dataset_path"]).is_dir():
        raise UserError(f"--data {Path.cwd()} has no folder {config['dataset_path']}, where the task's data would be")
    changes = {
        **benchmark.changes,
        # without the tables for submission to a server: Excel does not take every answer
        "metric_list": [metric for metric in config["metric_list"] if metric["metric"] != "submission"],
    }
    return simple_evaluate(
        model=model,
        tasks=[{"task": benchmark.task, **changes}],
        # this one folder: to read all of them takes longer than a small task
        task_manager=lmms_eval.tasks.TaskManager(include_path=str(path.parent), include_defaults=False),
        batch_size=model.batch_size,
        bootstrap_iters=0,
        process_docs_parallel=1,  # unparsed answers of MMMU are guessed: in a fixed order, from a seed
        cli_args=Namespace(output_path=str(out / "harness"), process_with_media=False),
    )


def collect(name: str, results: dict, facts: dict) -> tuple[dict, list[Item]]:
    """Facts and items of a benchmark, from the harness's results."""
    benchmark = BENCHMARKS[name]
    samples = sorted(results["samples"][benchmark.task], key=lambda sample: sample["doc_id"])
    scores = results["results"][benchmark.task]
    facts = {
        "benchmark": name,
        "task": benchmark.task,
        **facts,
        "documents": results["n-samples"][benchmark.task]["original"],
        "harness": {
            title: scores[f"{column.metric},none"] / column.scale for title, column in benchmark.columns.items()
        },
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "versions": {package: metadata.version(package) for package in pins()},
    }
    return facts, [to_item(benchmark, sample) for sample in samples]


def to_item(benchmark: Benchmark, sample: dict) -> Item:
    unit = benchmark.unit(sample["doc"])
    return {
        "item": sample["doc_id"],
        "unit": sample["doc_id"] if unit is None else unit,
        "group": sample["doc"][benchmark.group] if benchmark.group else None,
        "question": sample["arguments"][0],
        "answer": sample["filtered_resps"][0],
        "target": str(sample["doc"].get("answers", sample["target"])),  # the VQA tasks' target is the word "answer"
        "right": right(benchmark, sample),
    }


def right(benchmark: Benchmark, sample: dict) -> float:
    """How right an answer is, 0..1, by the harness's own rule for it."""
    metric, *_ = (sample[column.metric] for column in benchmark.columns.values() if column.metric in sample)
    if benchmark.task == "mmmu_val":
        from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

        return evaluate_mmmu([metric])[1]["acc"]
    if benchmark.task == "mmbench_en_dev_static":
        import pandas
        from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

        answers = {metric["index"]: metric["answer"]}
        return float(mmbench_evaluator.eval_sub_data(pandas.DataFrame([metric]), answers, static_only=True))
    return float(metric["score"] if isinstance(metric, dict) else metric)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
