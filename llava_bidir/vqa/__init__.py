"""Table 1: language benchmarks through lmms-eval, which runs in an environment of its own (`make vqa-venv`).

run.py, check.py, table.py and statistics.py need nothing of the harness; model.py and harness.py run inside it. Between
the two lie files: of each task TASK.json with the scores and what they were made with, and TASK.jsonl, a line an item.
"""
