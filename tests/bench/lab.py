"""Latencies of the lab over HTTP, on two tiny models or on runs: PYTHONPATH=tests/helpers python tests/bench/lab.py."""

import argparse
import http.client
import json
import tempfile
import time
from pathlib import Path

import labs
import numpy as np
import tiny_models

VIEW = {"photo": "split:0", "model": 0}
BLOCK = {"kind": "block", "patches": [0]}
BARE, PAINTED = "bare forward, all sites", "read, newly painted"


def first_word(port: int, question: dict) -> None:
    """Ask, and leave after the first event with a text or the result."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/run/ask", json.dumps(question), {"Cookie": f"lab-{port}={labs.TOKEN}"})
    next(event for event in map(json.loads, connection.getresponse()) if event.keys() & {"text", "result"})
    connection.close()


def tiny_runs() -> list[str]:
    """Train probes on two tiny models."""
    folder = Path(tempfile.mkdtemp())
    for mask in ("causal", "bidirectional"):
        (folder / mask).mkdir()
    checkpoints = {mask: tiny_models.write_checkpoint(folder / mask, mask) for mask in ("causal", "bidirectional")}
    return labs.fit_runs(checkpoints, folder / "runs")


def measure(runs: list[str], count: int) -> None:
    """Print the median and 95th percentile of each operation, in ms, and of the bare forward."""
    session = labs.open_session(runs)
    model = session.models[0].mllm
    pixels = model.preprocess([session.photos.get("split:0").squares[0]])
    layers, tokens, medians = len(model.decoder.layers), model.grid[0] * model.grid[1], {}
    question = VIEW | {"question": "name row1 column1"}

    def painted(i: int, **limits) -> dict:
        """Return another intervention each time. Only the view without one is kept, as when a person paints."""
        for view in [view for view in session._states if view.intervention is not None]:
            del session._states[view]
        return VIEW | {"intervention": BLOCK | {"patches": [i % tokens]} | limits}

    with labs.serve(session) as port:
        operations = {
            BARE: lambda i: model.states(pixels),
            "read, kept states": lambda i: labs.run(port, "read", VIEW),
            PAINTED: lambda i: labs.run(port, "read", painted(i)),
            "read, painted, last layer": lambda i: labs.run(port, "read", painted(i, layers=[layers])),
            "words_of_patch": lambda i: labs.run(port, "words_of_patch", VIEW | {"patch": i % tokens}),
            "pixel_map": lambda i: labs.run(port, "pixel_map", VIEW | {"site": "layer_02"}),
            "attention": lambda i: labs.run(port, "attention", VIEW | {"patch": i % tokens, "layer": 2}),
            "rollout": lambda i: labs.run(port, "rollout", VIEW | {"patch": i % tokens, "layer": layers}),
            "answer_attention": lambda i: labs.run(
                port, "answer_attention", question | {"answer": "the sky", "token": 0, "layer": 2}
            ),
            "ask, to the first word": lambda i: first_word(port, question),
            "ask": lambda i: labs.run(port, "ask", question),
            "control, matched": lambda i: labs.run(
                port, "control", VIEW | {"intervention": BLOCK, "control": "matched", "seed": i}
            ),
            "snippet": lambda i: labs.run(port, "snippet", VIEW),
        }
        times: dict[str, list[float]] = {name: [] for name in operations}
        for i in range(count + 1):  # in turns, so that other work on the machine slows all of them
            for name, operation in operations.items():
                start = time.perf_counter()
                operation(i)
                times[name].append(1000 * (time.perf_counter() - start))
    for name, of_name in times.items():
        medians[name], late = np.percentile(of_name[1:], [50, 95])
        print(f"{name:25} median {medians[name]:6.1f} ms, 95th percentile {late:6.1f} ms")
    print(f"{PAINTED} / bare forward: {medians[PAINTED] / medians[BARE]:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="requests per operation")
    parser.add_argument("--runs", nargs="+", help="finished probe runs instead of the tiny ones")
    given = parser.parse_args()
    measure(given.runs or tiny_runs(), given.count)
