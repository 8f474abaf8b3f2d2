"""Run tasks of lmms-eval in its environment: `python -m llava_bidir.vqa.harness REQUEST`, started by run.py.

REQUEST is a JSON object: "model" is a checkpoint directory, "benchmarks" a list of names, "out" the folder of results,
"batch_size" the questions per batch, "info" a dict to store with the results, "package" the folder of llava_bidir.
If "local" is true, a dataset ORG/NAME is read from that folder below the working directory instead of the hub.

Under `torchrun` every process answers a share of the items. The first one collects and writes them.
"""

import ast
import json
import os
import re
import sys
import time
from argparse import Namespace
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from unittest.mock import patch

from llava_bidir.common.errors import UserError

from .benchmarks import BENCHMARKS, Benchmark
from .result_files import PACKAGE, ItemError, error_file, pinned_versions, write_results
from .scores import Item


def main(request: dict) -> None:
    """Run the benchmarks of a request one by one and write the results of each.

    Raises:
        Exception: Any error. Its message, with the task and the item, is also written to the error file.
    """
    out = Path(request["out"])
    name = "setting up"
    try:
        check_environment(request["package"])
        import torch.distributed as dist
        from lmms_eval.models import get_model  # may be missing, so check_environment comes first
        from lmms_eval.utils import load_yaml_config

        model = get_model("llava_bidir").create_from_arg_string(
            f"pretrained={request['model']}", {"batch_size": request["batch_size"]}
        )
        for name in request["benchmarks"]:
            start = time.monotonic()
            config_file = find_config(BENCHMARKS[name])
            if request["local"]:
                check_local_data(load_yaml_config(str(config_file))["dataset_path"])
            results = run_benchmark(BENCHMARKS[name], model, out, config_file)
            if results is not None:
                run_info = {"device": str(model.device), "dtype": str(model.model.dtype)}
                info = request["info"] | run_info | {"seconds": round(time.monotonic() - start, 1)}
                write_results(out, name, *collect_results(name, results, info))
        if dist.is_initialized():
            # threads of its that outlive the interpreter would abort the process
            dist.destroy_process_group()
    except Exception as error:
        # the harness reads data five times
        cause = error.__cause__ if type(error).__name__ == "RetryError" else error
        kind = "" if isinstance(cause, (ItemError, UserError)) else f"{type(cause).__name__}: "
        error_file(out).write_text(f"{name}: {kind}{str(cause).strip()}\n")
        raise


def check_environment(package: str) -> None:
    """Raise a UserError unless packages have their pinned versions and llava_bidir is that in the folder `package`."""
    found = installed_versions()
    for name, pinned in pinned_versions().items():
        if found.get(name, "").partition("+")[0] != pinned:  # without the local part, e.g. "+cu130"
            what = f"{name} {found.get(name)} instead of {pinned}"
            raise UserError(
                f"the harness's environment has {what}; recreate it with `make vqa-venv`"
            )
    if package != str(PACKAGE):
        raise UserError(
            f"the harness's environment has another llava_bidir, at {PACKAGE}; run `make vqa-venv` again"
        )


def installed_versions() -> dict[str, str]:
    """Return the installed version of each pinned package. Missing packages are left out."""
    versions = {}
    for package in pinned_versions():
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def find_config(benchmark: Benchmark) -> Path:
    """Return the YAML file of a task, of this package or of the harness."""
    import lmms_eval.tasks

    ours = f"tasks/{benchmark.task}.yaml"
    theirs = f"*/{benchmark.task}.yaml"
    (path,) = [
        *Path(__file__).parent.glob(ours),
        *Path(lmms_eval.tasks.__file__).parent.glob(theirs),
    ]
    return path


def check_local_data(path: str) -> None:
    """Raise a UserError if the working directory lacks the folder of a task's "dataset_path"."""
    # else it is a format, whose files the benchmark names
    if "/" in path and not Path(path).is_dir():
        raise UserError(f"--data {Path.cwd()} has no folder {path} with the dataset of the task")


def run_benchmark(
    benchmark: Benchmark,
    model,
    out: Path,
    config_file: Path,
) -> dict | None:
    """Return the results of the harness with all samples, None in all processes but the first."""
    import lmms_eval.tasks
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.utils import load_yaml_config

    config = load_yaml_config(str(config_file))
    overrides = {
        **benchmark.overrides,
        # no spreadsheets for submission to a server: Excel rejects some answers
        "metric_list": [
            metric for metric in config["metric_list"] if metric["metric"] != "submission"
        ],
    }
    return simple_evaluate(
        model=model,
        tasks=[{"task": benchmark.task, **overrides}],
        # one folder only: indexing all tasks takes longer than a small task
        task_manager=lmms_eval.tasks.TaskManager(
            include_path=str(config_file.parent), include_defaults=False
        ),
        batch_size=model.batch_size,
        bootstrap_iters=0,
        # MMMU guesses for answers it cannot parse, reproducibly only in a fixed order
        process_docs_parallel=1,
        cli_args=Namespace(output_path=str(out / "harness"), process_with_media=False),
    )


def collect_results(name: str, results: dict, info: dict) -> tuple[dict, list[Item]]:
    """Return the info and the items of a benchmark from the results of the harness."""
    benchmark = BENCHMARKS[name]
    samples = sorted(results["samples"][benchmark.task], key=lambda sample: sample["doc_id"])
    scores = results["results"][benchmark.task]
    info = {
        "benchmark": name,
        "task": benchmark.task,
        **info,
        "documents": results["n-samples"][benchmark.task]["original"],
        "harness": {
            title: scores[f"{c.metric},none"] / c.scale
            for title, c in benchmark.columns.items()
            if c.metric
        },
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "versions": installed_versions(),
    }
    return info, [to_item(benchmark, sample) for sample in samples]


def to_item(benchmark: Benchmark, sample: dict) -> Item:
    """Convert a sample of the harness."""
    unit = benchmark.unit_of(sample["doc"])
    return {
        "item": sample["doc_id"],
        "unit": sample["doc_id"] if unit is None else unit,
        "group": sample["doc"][benchmark.group_key] if benchmark.group_key else None,
        "question": sample["arguments"][0],
        "answer": sample["filtered_resps"][0],
        # the VQA tasks' target is the word "answer"
        "target": str(sample["doc"].get("answers", sample["target"])),
        "right": rate_answer(benchmark, sample),
        **({"guessed": True} if is_guessed(benchmark, sample) else {}),
    }


def is_guessed(benchmark: Benchmark, sample: dict) -> bool:
    """Return True if the harness found no option in an answer of MMMU, and drew one, or of MMBench."""
    if benchmark.task == "mmbench_en_dev_static":
        from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

        answer = sample["gpt_eval_score"]
        letters = "".join(mmbench_evaluator.build_choices(answer))
        # Without a letter that stands alone, the harness takes the last capital in a word: "Car" is an answer C.
        is_named = re.search(rf"\b[{letters}]\b", answer["prediction"])
        return not (is_named or mmbench_evaluator.prefetch_answer(answer))
    if benchmark.task != "mmmu_val" or sample["doc"]["question_type"] != "multiple-choice":
        return False
    from lmms_eval.tasks.mmmu.utils import get_multi_choice_info, parse_multi_choice_response

    names, letters = get_multi_choice_info(ast.literal_eval(sample["doc"]["options"]))
    with patch("random.choice", return_value=None):
        return parse_multi_choice_response(sample["filtered_resps"][0], letters, names) is None


def rate_answer(benchmark: Benchmark, sample: dict) -> float:
    """Return the correctness of an answer, 0..1, by the rule of the harness."""
    metric, *_ = (
        sample[column.metric] for column in benchmark.columns.values() if column.metric in sample
    )
    if benchmark.task == "mmmu_val":
        from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

        return evaluate_mmmu([metric])[1]["acc"]
    if benchmark.task == "mmbench_en_dev_static":
        import pandas
        from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

        answers = {metric["index"]: metric["answer"]}
        return float(
            mmbench_evaluator.eval_sub_data(pandas.DataFrame([metric]), answers, static_only=True)
        )
    return float(metric["score"] if isinstance(metric, dict) else metric)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
