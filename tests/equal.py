"""Compare what users get from this checkout and from another one, on one machine.

    git worktree add --detach DIR COMMIT
    make equal OTHER=DIR

Prints the largest difference of each kind of number, and the keys that came or went; status 1 above a tolerance. CamVid
needs LLAVA_BIDIR_TEST_DATA, a folder that has it.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import task_runs
import tiny_models
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).resolve().parents[1]
CAMVID = Path(os.environ.get("LLAVA_BIDIR_TEST_DATA", "nowhere")) / "camvid"
SOLVE = "-m probes solve -c demo/probes --model.mllm demo/bidirectional/stage2/hf"
COMMANDS = {
    "demo": "-m probes demo --out demo --scale 0.05 --extras",
    "depth": f"{SOLVE} --out depth --data.task depth --data.root ../data",
    "boundaries": f"{SOLVE} --out boundaries --data.task boundaries --data.root ../data",
    "camvid": f"{SOLVE} --out camvid --data.root {CAMVID} --model.sites [encoder,adapter,layer_04]",
    "states": "-m probes states demo/causal/stage2/hf ../data/images/validation/000.png --out states.safetensors",
    "ids": "-c",
}
ENCODE = """
import json
from transformers import AutoTokenizer
from llava_bidir.data.conversation import encode
tokenizer = AutoTokenizer.from_pretrained("demo/assets/llm")
files = {"plain": "captions", "vicuna_v1": "dialogues"}
records = {template: json.load(open(f"demo/assets/{name}.json")) for template, name in files.items()}
ids = {t: [encode(x["conversations"], tokenizer, t, 9, 7) for x in of_file] for t, of_file in records.items()}
json.dump(ids, open("ids.json", "w"))
"""
TOLERANCES = {
    "integers": 0,  # ids of tokens, counts
    "verdicts": 0,
    "words": 0,  # texts of tables and results.json
    "pages": 0,  # what a page says, a line a key
    "losses of training": 0,
    "weights of models": 0,
    "states": 1e-6,
    "scores": 1e-6,  # fractions: 1e-4 points
    "tensors": 1e-6,  # of runs: probes, counts, effects
}
ALIKE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
NAMES = "claim image_attention run model task of site metric class condition effect source target a b".split()
UNNAMED = r".*/(?=[^/]+\.\w+/)|#?\d+|,nan"  # folders and numbers in a key
VERDICTS = ("verdict", "conclusion", "site")
SHOWN = 30  # kinds of keys that came or went
APART = re.compile(r"wall_s|seconds|_per_s|memory|peak_gb|logs/|checkpoints/|manifest\.json")


def run(checkout: Path, out: Path) -> None:
    """Run all commands in `out` with the code of a checkout."""
    environment = os.environ | ALIKE | {"PYTHONPATH": str(checkout)}
    shutil.rmtree(out, ignore_errors=True)  # results of other code
    out.mkdir(parents=True)
    for name, line in COMMANDS.items():
        words = [sys.executable, *line.split()] + [ENCODE] * (name == "ids")
        with (out / f"{name}.log").open("w") as log:
            subprocess.run(words, cwd=out, env=environment, stdout=log, stderr=log, check=True)


def flatten(value, key: str) -> Iterator[tuple[str, object]]:
    """Yield the leaves of JSON by path; a row of a list by its names, so that rows may come and go."""
    if isinstance(value, list):
        rows = [item if isinstance(item, dict) else {} for item in value]
        names = [",".join(str(row[name]) for name in NAMES if name in row) for row in rows]
        value = {f"{n}#{names[:i].count(n)}": value[i] for i, n in enumerate(names)}
    if isinstance(value, dict):
        for name, item in value.items():
            yield from flatten(item, f"{key}/{name}")
    else:
        yield key, value


def read_file(path: Path, name: str) -> Iterator[tuple[str, str, object]]:
    """Yield (kind, key, value) of all that a file holds; values are tensors, numbers and texts."""
    if path.suffix == ".safetensors":
        kinds = {"model": "weights of models", "states": "states"}
        for key, tensor in load_file(path).items():
            yield kinds.get(path.stem, "tensors"), f"{name}/{key}", tensor
    elif path.name.startswith("events.out"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in (tag for tag in events.Tags()["scalars"] if "loss" in tag):
            values = torch.tensor([event.value for event in events.Scalars(tag)])
            yield "losses of training", f"{Path(name).parent}/{tag}", values
    elif path.suffix in (".json", ".csv"):
        read = json.load if path.suffix == ".json" else lambda x: pd.read_csv(x).to_dict("records")
        for key, value in flatten(read(path.open()), name):
            if isinstance(value, int | float):
                yield "integers" if isinstance(value, int) else "scores", key, value
            elif isinstance(value, str):
                yield "verdicts" if key.endswith(VERDICTS) else "words", key, value
    elif path.suffix == ".html":
        for i, line in enumerate(words_of_page(path.read_text())):
            yield "pages", f"{name}/{i}", line


def words_of_page(html: str) -> list[str]:
    """Return what a page says, and the paths of its drawings, without pictures and scripts."""
    without_code = re.sub(r"(?s)<(script|style)\b.*?</\1>", " ", html)
    without_pictures = re.sub(r"data:[\w/+;-]+,[^\"')]*", "", without_code)
    lines = (" ".join(line.split()) for line in re.split(r"(?=<)", without_pictures))
    return [line for line in lines if line and not APART.search(line)]


def read_folder(out: Path) -> dict[str, tuple[str, object]]:
    """Return all that is compared in a folder: {key: (kind, value)}."""
    names = [str(path.relative_to(out)) for path in sorted(out.rglob("*")) if path.is_file()]
    entries = [x for name in names if not APART.search(name) for x in read_file(out / name, name)]
    return {key: (kind, value) for kind, key, value in entries if not APART.search(key)}


def difference(one, other) -> float:
    """Return the largest absolute difference of two values, infinite where they cannot be compared."""
    if not all(isinstance(value, float | torch.Tensor) for value in (one, other)):
        return 0.0 if one == other else math.inf
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    differs = ~torch.isclose(one, other, rtol=0, atol=0, equal_nan=True)
    return max((one[differs].double() - other[differs].double()).abs().tolist(), default=0.0)


def main() -> int:
    """Run both checkouts, print the table, and return the exit status."""
    other, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    if not (out / "data").exists():
        task_runs.write_targets(tiny_models.write_segmentation(out / "segmentation"), out / "data")
    if not CAMVID.is_dir():
        print(f"skipped: {COMMANDS.pop('camvid')}")
    folders = {HERE: out / "this", other: out / "other"}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, folders, folders.values()))
    this, other = map(read_folder, folders.values())
    failed = False
    for kind, most in TOLERANCES.items():
        keys = [key for key in this.keys() & other.keys() if this[key][0] == kind]
        differences = [(difference(this[key][1], other[key][1]), key) for key in keys]
        largest, key = max(differences, default=(math.inf, "nothing to compare"))
        failed |= largest > most
        print(
            f"{kind:18} {len(differences):9,}, at most {largest:.3g} apart (allowed: {most:g}) {key}"
        )
    for title, keys in (("came", this.keys() - other.keys()), ("went", other.keys() - this.keys())):
        print(f"keys that {title}: {len(keys):,}")
        names = Counter("/".join(re.sub(UNNAMED, "", key).split("/")[:3]) for key in keys)
        for name, count in names.most_common(SHOWN):
            print(f"{count:9,} {name}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
