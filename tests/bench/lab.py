"""Latencies of the lab over HTTP, on two tiny models: PYTHONPATH=tests/helpers python tests/bench/lab.py."""

import argparse
import tempfile
import time
from pathlib import Path

import labs
import numpy as np
import tiny_models

VIEW = {"photo": "split:0", "model": 0}
BLOCK = {"kind": "block", "patches": [0]}


def measure(count: int) -> None:
    """Print the median and 95th percentile of each operation, in ms, and of the bare forward."""
    folder = Path(tempfile.mkdtemp())
    for mask in ("causal", "bidirectional"):
        (folder / mask).mkdir()
    checkpoints = {mask: tiny_models.write_checkpoint(folder / mask, mask) for mask in ("causal", "bidirectional")}
    session = labs.open_session(labs.fit_runs(checkpoints, folder / "runs"))
    pixels = session.models[0].mllm.preprocess([session.photos.get("split:0").squares[0]])

    def painted(i: int) -> dict:
        """Return another intervention each time, so that no kept states answer."""
        session._states.clear()
        return VIEW | {"intervention": BLOCK | {"patches": [i % 4]}}

    with labs.serve(session) as port:
        operations = {
            "bare forward, all sites": lambda i: session.models[0].mllm.states(pixels),
            "read, newly painted": lambda i: labs.run(port, "read", painted(i)),
            "read, kept states": lambda i: labs.run(port, "read", VIEW),
            "words_of_patch": lambda i: labs.run(port, "words_of_patch", VIEW | {"patch": i % 4}),
            "pixel_map": lambda i: labs.run(port, "pixel_map", VIEW | {"site": "layer_02"}),
            "attention": lambda i: labs.run(port, "attention", VIEW | {"patch": i % 4, "layer": 2}),
            "control, matched": lambda i: labs.run(
                port, "control", VIEW | {"intervention": BLOCK, "control": "matched", "seed": i}
            ),
            "snippet": lambda i: labs.run(port, "snippet", VIEW),
        }
        for name, operation in operations.items():
            times = []
            for i in range(count + 1):
                start = time.perf_counter()
                operation(i)
                times.append(1000 * (time.perf_counter() - start))
            median, late = np.percentile(times[1:], [50, 95])
            print(f"{name:25} median {median:6.1f} ms, 95th percentile {late:6.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="requests per operation")
    measure(parser.parse_args().count)
