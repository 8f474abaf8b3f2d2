"""The path of strengths of regularisation along which `probes solve` has solved the probes of each site."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# how probes were solved: classes by their loss, other tasks by least squares
OPTIMUM = "optimum"
CLOSED_FORM = "closed_form"

# A certificate says how far a point can be from the minimum. It holds up to these:
CONVERGED = 1e-4  # decrease in nats that a further step is expected to have
GRADIENT = 1e-3  # the gradient's norm relative to that at w = 0
# steps along the path, which runs from strong to weak
ROWS = {"stronger": -1, "chosen": 0, "weaker": 1}


@dataclass(frozen=True)
class Strengths:
    """The strengths of a solved run, strong to weak.

    A "row" is one strength for each site: the chosen ones, or those that all sites have one step stronger or weaker.

    Args:
        sites: The entries of the sites in metrics.json["path"].
        score: Name of the main score.
        exact: The probes are the closed form of least squares, which needs no certificates.
    """

    sites: list[dict[str, Any]]
    score: str
    exact: bool = False

    @property
    def solved(self) -> list[list[int]]:
        """Indices of the R solved strengths of each site."""
        return [
            [i for i, value in enumerate(site[self.score]) if value is not None]
            for site in self.sites
        ]

    def neighbours(self) -> dict[str, Tensor]:
        """Return the rows "stronger", "chosen" and "weaker": the index i64[S] into `solved` at each site.

        A site whose choice is at the end of its path has no neighbour there and keeps its choice. A row in which all
        sites do is left out.
        """
        solved = self.solved
        chosen = [
            found.index(site["strengths"].index(site["chosen"]))
            for site, found in zip(self.sites, solved, strict=True)
        ]
        last = len(solved[0]) - 1  # all sites have as many solved strengths
        indices = torch.tensor(chosen)
        rows = {name: indices.add(step).clamp(0, last) for name, step in ROWS.items()}
        return {
            name: row
            for name, row in rows.items()
            if name == "chosen" or (row != rows["chosen"]).any()
        }

    def unconverged(self, row: Tensor, sites: list[int]) -> dict[str, dict[str, Any] | None]:
        """Return the certificates of a row i64[S] that do not hold at these sites, by name: None if nothing is known.

        There are none of least squares, which needs no certificates.
        """
        found = {}
        for i in [] if self.exact else sites:
            entry = self.sites[i]
            certificates = entry.get("certificates")
            certificate = certificates and certificates[self.solved[i][int(row[i])]]
            if not certificate or not certificate.get("converged"):
                found[entry["site"]] = certificate
        return found


def is_at_end(strengths: list[float], lowest: float) -> bool:
    """Return whether the strength of the lowest loss is the first or the last of several that were tried."""
    return len(strengths) > 1 and lowest in (strengths[0], strengths[-1])
