"""Change the harness as STUB says, then run it.

STUB=oracle  answer from the data: right in the first half of each task, wrong in the second
STUB=raises  raise in the second batch
STUB=drops   drop the last sample of each task
STUB=version report an older lmms-eval and a missing package
STUB=code    report another copy of this package
STUB=logits  only print the logits of one prompt, under the model's own mask and causally
"""

import json
import os
import runpy
import sys
from importlib import metadata

import lmms_eval.evaluator

import llava_bidir.vqa.lmms_model as model
import llava_bidir.vqa.result_files as files

answer, simple_evaluate, version = model.answer, lmms_eval.evaluator.simple_evaluate, metadata.version
calls = []


def raises(*args, **kwargs):
    calls.append(args)
    if len(calls) == 2:
        raise FloatingPointError("out of range")
    return answer(*args, **kwargs)


def drops(**kwargs):
    results = simple_evaluate(**kwargs)
    for samples in results["samples"].values():
        samples.pop()
    return results


def oracle(**kwargs):
    """Replace the model's answers. Prompts are still built."""

    class Oracle(type(kwargs["model"])):
        def generate_until(self, requests):
            super().generate_until(requests[:1])
            asked = [(self.task_dict[task][split][i], i, task) for *_, i, task, split in (r.args for r in requests)]
            return [_say(task, doc, i < len(requests) // 2) for doc, i, task in asked]

    kwargs["model"].__class__ = Oracle
    return simple_evaluate(**kwargs)


def _say(task: str, doc: dict, right: bool) -> str:
    if task in ("textvqa_val", "vizwiz_vqa_val"):
        return doc["answers"][0] if right else "nothing"
    if task == "scienceqa_img":
        return "ABC"[doc["answer"]] if right else "ABC"[doc["answer"] - 1]
    wrong = {"yes": "No", "no": "Yes", "a": "B", "b": "C", "c": "A", "sky": "wall"}
    return doc["answer"] if right else wrong.get(doc["answer"].lower(), "nothing")


def other_version(package: str) -> str:
    if package == "openpyxl":
        raise metadata.PackageNotFoundError(package)
    return "0.7.2" if package == "lmms_eval" else version(package)


def logits(request: dict) -> None:
    import torch
    from lmms_eval.models import get_model

    lm = get_model("llava_bidir").create_from_arg_string(f"pretrained={request['model']}", {"batch_size": 1})
    image = lm.processor.image_token_id
    inputs = {
        "input_ids": torch.tensor([[1, 5, *[image] * lm.model.config.image_seq_length, 7, 8]]),
        "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    }
    with torch.no_grad():
        own = lm.model(**inputs).logits[0, -1]
        lm.model.config.image_attention = "causal"
        causal = lm.model(**inputs).logits[0, -1]
    print("logits", json.dumps([type(lm).__name__, own.tolist(), causal.tolist()]))


stub = os.environ["STUB"]
if stub == "logits":
    logits(json.loads(sys.argv[-1]))
    sys.exit()
if stub == "raises":
    model.answer = raises
if stub in ("oracle", "drops"):
    lmms_eval.evaluator.simple_evaluate = {"oracle": oracle, "drops": drops}[stub]
if stub == "version":
    metadata.version = other_version
if stub == "code":
    files.code_digest = lambda: "another"
del sys.argv[0:2]  # this file, and -m
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
