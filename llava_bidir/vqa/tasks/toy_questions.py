"""Functions of toy_questions.yaml. A record is one of LLaVA's JSON; its first question is asked."""

from PIL import Image


def doc_to_visual(record: dict) -> list[Image.Image]:
    """Return the images of a record."""
    return [Image.open(record["image"]).convert("RGB")]


def doc_to_text(record: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Return the question."""
    return record["conversations"][0]["value"].replace("<image>", "").strip()


def doc_to_target(record: dict) -> str:
    """Return the expected answer."""
    return record["conversations"][1]["value"].strip()


def process_results(record: dict, results: list[str]) -> dict[str, float]:
    """Return the exact match, as in `validation_step` of training/module.py."""
    return {"exact_match": float(results[0].strip() == doc_to_target(record))}
