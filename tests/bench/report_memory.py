"""Peak memory of `probes report` on a synthetic finished study of both masks and an untrained model.

python tests/bench/report_memory.py OUT --sites 34 --classes 150 --images 2000
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import probe_runs

# The peak of the process itself: what the kernel says of a child has that of its parent before it starts.
REPORT = """
import sys, time
from pathlib import Path
from probes.cli import main
main(sys.argv[1:])
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) / 1024
print(f"{time.process_time():.1f} CPU-s, peak {peak:.0f} MB")
"""
KINDS = {
    "causal": {},
    "bidirectional": {"mask": "bidirectional"},
    "untrained": {"untrained": True, "seed": 1},
}


def write_study(
    out: Path,
    sites: int,
    classes: int,
    images: int,
) -> None:
    """Write the runs of a study."""
    root = out / "data"
    root.mkdir(parents=True)
    palette = [[i % 256, 255 - i % 256, 7] for i in range(classes)]
    names = [f"class {i}" for i in range(classes)]
    (root / "classes.json").write_text(json.dumps({"classes": names, "palette": palette}))
    quality = [0.5 + 0.2 * min(i, sites - i) / sites for i in range(sites)]
    probe_runs.GRID = (24, 24)
    for name, more in KINDS.items():
        probe_runs.write_run(out / name, quality, root=root, images=images, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    for name, default in (("sites", 34), ("classes", 150), ("images", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    write_study(args.out, args.sites, args.classes, args.images)
    words = [sys.executable, "-c", REPORT, "report", args.out, "--out", args.out / "report"]
    subprocess.run([*map(str, words)], check=True)


if __name__ == "__main__":
    main()
