"""Run the harness with answers from its data: right in the first half of each task, wrong in the second."""

import runpy
import sys

import lmms_eval.evaluator

simple_evaluate = lmms_eval.evaluator.simple_evaluate


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
    wrong = {"yes": "No", "no": "Yes", "a": "B", "b": "C", "c": "A", "sky": "wall"}
    return doc["answer"] if right else wrong.get(doc["answer"].lower(), "nothing")


lmms_eval.evaluator.simple_evaluate = oracle
del sys.argv[0:2]  # this file, and -m
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
