"""The command `probes verify-data`."""

import time

from llava_bidir.common.processes import usable_cores
from probes.config import VerifyOptions

from .base import shared_images
from .probe_data import ProbeData
from .verify import format_labels


def run(options: VerifyOptions) -> None:
    """Read every image and target of both splits, and print what they contain.

    Raises:
        UserError: If some cannot be used, or no pixel of a split is labelled; the message names them.
    """
    data = ProbeData(**vars(options.data))
    workers = options.workers
    start = time.perf_counter()
    data.check_files(data.find_bad_files(usable_cores() if workers is None else workers))
    data.shared_images = shared_images(data.splits["training"], data.splits["validation"])
    print(format_labels(data.classes, data.labels))
    for note in data.notes():
        print(f"warning: {note}")
    sizes = ", ".join(f"{len(dataset):,} {split} images" for split, dataset in data.splits.items())
    targets = f"{data.num_classes} classes" if data.classes else data.task
    print(f"{data.root}: {sizes}, {targets}, all readable ({time.perf_counter() - start:.0f} s)")
