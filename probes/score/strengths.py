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
ROWS = {
    "stronger": -1,
    "chosen": 0,
    "weaker": 1,
}


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

    def certificates(self, row: Tensor, sites: list[int]) -> dict[str, dict[str, Any] | None]:
        """Return the certificates of a row i64[S] at these sites by name: None if nothing is known."""
        solved = self.solved
        found = {}
        for site in sites:
            entry = self.sites[site]
            certificates = entry.get("certificates")
            strength = solved[site][int(row[site])]
            found[entry["site"]] = certificates[strength] if certificates else None
        return found

    def unconverged(self, row: Tensor, sites: list[int]) -> dict[str, dict[str, Any] | None]:
        """Return the certificates that do not hold, by site; {} of least squares, which needs none."""
        if self.exact:
            return {}
        return {
            site: certificate
            for site, certificate in self.certificates(row, sites).items()
            if not certificate or not certificate.get("converged")
        }

    def has_converged(self, row: Tensor, sites: list[int]) -> bool:
        """Return whether the probes of a row i64[S] have converged at all these sites."""
        return not self.unconverged(row, sites)

    def at_edge(self) -> list[str]:
        """Return the sites whose cross-validated loss is lowest at an end of the path, where it may fall further."""
        return [site["site"] for site in self.sites if is_at_end(site["strengths"], site["lowest"])]


def is_at_end(strengths: list[float], lowest: float) -> bool:
    """Return whether the strength of the lowest loss is the first or the last of several that were tried."""
    return len(strengths) > 1 and lowest in (strengths[0], strengths[-1])
