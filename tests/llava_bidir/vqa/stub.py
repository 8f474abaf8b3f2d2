"""Change the harness as STUB says, then run it.

STUB=oracle  answer from the data: right in the first half of each task, wrong in the second
STUB=raises  raise in the second batch
STUB=version report an older lmms-eval and a missing package
STUB=code    report another folder of this package
"""

import os
import runpy
import sys
from importlib import metadata

import lmms_eval.evaluator

import llava_bidir.vqa.lmms_model as model
import llava_bidir.vqa.result_files

answer = model.answer
simple_evaluate = lmms_eval.evaluator.simple_evaluate
version = metadata.version
calls = []


def raises(*args, **kwargs):
    calls.append(args)
    if len(calls) == 2:
        raise FloatingPointError("out of range")
    return answer(*args, **kwargs)


def oracle(**kwargs):
    """Replace the model's answers. Prompts are still built."""

    class Oracle(type(kwargs["model"])):
        def generate_until(self, requests):
            super().generate_until(requests[:1])
            asked = [
                (self.task_dict[task][split][i], i, task)
                for *_, i, task, split in (r.args for r in requests)
            ]
            return [_say(task, doc, i < len(requests) // 2) for doc, i, task in asked]

    kwargs["model"].__class__ = Oracle
    return simple_evaluate(**kwargs)


def _say(task: str, doc: dict, right: bool) -> str:
    if task in ("textvqa_val", "vizwiz_vqa_val"):
        return doc["answers"][0] if right else "nothing"
    if task == "scienceqa_img":
        return "ABC"[doc["answer"]] if right else "ABC"[doc["answer"] - 1]
    wrong = {
        "yes": "No",
        "no": "Yes",
        "a": "B",
        "b": "C",
        "c": "A",
        "sky": "wall",
    }
    return doc["answer"] if right else wrong.get(doc["answer"].lower(), "nothing")


def other_version(package: str) -> str:
    if package == "openpyxl":
        raise metadata.PackageNotFoundError(package)
    return "0.7.2" if package == "lmms_eval" else version(package)


stub = os.environ["STUB"]
if stub == "raises":
    model.answer = raises
if stub == "oracle":
    lmms_eval.evaluator.simple_evaluate = oracle
if stub == "version":
    metadata.version = other_version
if stub == "code":
    llava_bidir.vqa.result_files.PACKAGE = "another"
del sys.argv[0:2]  # this file, and -m
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
