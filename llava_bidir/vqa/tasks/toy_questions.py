"""Functions of toy_questions.yaml: a record is one of LLaVA's JSON, of which the first question is asked."""

from PIL import Image


def image(record: dict) -> list[Image.Image]:
    return [Image.open(record["image"]).convert("RGB")]


def question(record: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return record["conversations"][0]["value"].replace("<image>", "").strip()


def target(record: dict) -> str:
    return record["conversations"][1]["value"].strip()


def score(record: dict, results: list[str]) -> dict[str, float]:
    """Word for word, as the demo's own scorer has it (training/module.py validation_step)."""
    return {"exact_match": float(results[0].strip() == target(record))}
