"""Tensors of a run and of its analyses; files of a run that have changed since it wrote them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json, sha256
from llava_bidir.common.hf import DTYPE_ADVICE
from llava_bidir.common.processes import rank_zero_info
from llava_bidir.common.runs import RunFolder
from probes.tasks import SEGMENTATION, Task


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: If the file is damaged; the message names it.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); make it again") from None


class CountsOfSites(Mapping[str, torch.Tensor]):
    """Tensors of counts.safetensors at some sites, each read when it is asked for.

    Those of all sites would be gigabytes: 34 sites x 2,000 images x 150 classes are 80 MB a tensor, 34 x 2,000 x 576
    tokens 313 MB.

    Args:
        path: The file; its tensors with three axes have the sites as the first.
        rows: Indices of the sites.
    """

    def __init__(self, path: Path, rows: Sequence[int]):
        self.path = path
        self.rows = rows

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor at the sites.

        Raises:
            KeyError: The file has no such tensor.
        """
        with open_tensors(self.path) as file:
            if name not in file.keys():
                raise KeyError(name)
            part = file.get_slice(name)
            if len(part.get_shape()) < 3:
                return file.get_tensor(name)
            return torch.cat([part[row : row + 1] for row in self.rows])

    def __iter__(self) -> Iterator[str]:
        """Return the names of the tensors."""
        with open_tensors(self.path) as file:
            return iter(file.keys())

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len([*self])


@contextmanager
def open_tensors(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file, whose tensors are read one by one.

    Raises:
        UserError: If the file is damaged; the message names it.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); make it again") from None


def check_hash(path: Path, hashes: dict[str, str]) -> None:
    """Raise a UserError if a file is not the one that its run wrote.

    Args:
        path: A file that exists.
        hashes: SHA-256 by name, "files" of manifest.json.
    """
    if path.name in hashes and hashes[path.name] != sha256(path):
        raise UserError(
            f"{path} is not the file that the run wrote: its SHA-256 is not the one in manifest.json; restore the file "
            "or make the run again"
        )


def check_finite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raise a UserError that names `path` and the tensor if a weight is not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{path}: {name} is not finite; make the run again, in another dtype or with a lower learning rate: "
                f"{DTYPE_ADVICE}"
            )


# analyses check that they belong to the run's probes
RESULTS = (
    "predictions",
    "metrics.json",
    "manifest.json",
    "counts.safetensors",
    "effects.safetensors",
    "probes.safetensors",
)


def run_folder(out: Path) -> RunFolder:
    """Return the folder of a run of probes."""

    def read_identity():
        return read_json(out / "manifest.json")["identity"]

    return RunFolder(
        path=out,
        result=out / "metrics.json",
        results=RESULTS,
        read_identity=read_identity,
    )


def say_finished(out: Path, data_name: str, save_predictions: bool) -> None:
    """Say that the run is finished, and which options have no effect on it.

    Raises:
        UserError: It was made without predictions, which are wanted.
    """
    if save_predictions and not (out / "predictions").is_dir():
        raise UserError(
            f"{out} is finished without predictions, which are saved while probes are scored; make it again "
            "with --overwrite true, or in another --out"
        )
    name = read_json(out / "metrics.json")["dataset"]
    if name != data_name:
        rank_zero_info(f"{out} is finished, and its data set is still called {name!r}")
    rank_zero_info(f"{out / 'metrics.json'} exists: this run is finished; nothing to do")


def format_scores(out: Path, task: Task) -> str:
    """Return one line with the main scores of the finished run."""
    summary = read_json(out / "metrics.json")["summary"]
    main = {site: summary[site] for site in ("encoder", "adapter")}
    main |= {summary["peak_site"]: summary["peak_llm"], "final_norm": summary["final_norm"]}
    text = "{} {:.1%}" if task.name == SEGMENTATION else "{} {:.3g}"
    scores = ", ".join(
        text.format(site, value) for site, value in main.items() if value is not None
    )
    return f"{out}: {task.labels[task.score]} {scores or 'in metrics.json'}"
