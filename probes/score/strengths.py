"""The strengths of regularisation at which `probes solve` has solved the probes of each site, strong to weak."""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

# how probes were solved: classes by their loss, other tasks by least squares
OPTIMUM = "optimum"
CLOSED_FORM = "closed_form"

# A certificate says how far a point can be from the minimum. It holds up to these:
CONVERGED = 1e-4  # decrease in nats that a further step is expected to have
GRADIENT = 1e-3  # the gradient's norm relative to that at w = 0
# steps along the strengths of a site, from strong to weak
ROWS = {"stronger": -1, "chosen": 0, "weaker": 1}


class CertificateEntry(TypedDict):
    """How far the probes of a strength can be from the optimum (probes/solve/solution.py)."""

    gradient: float
    decrease: float
    converged: bool


class SiteStrengths(TypedDict, total=False):
    """A site in metrics.json["path"]: its lists have a value for each strength, None where it was not solved.

    The scores of the task are further lists.
    """

    site: str
    strengths: list[float]
    cv_cross_entropy: list[float]  # of segmentation
    cv_loss: list[float]  # of other tasks
    chosen: float
    lowest: float  # the strength of the lowest loss
    certificates: list[CertificateEntry | None]


@dataclass(frozen=True)
class Strengths:
    """The strengths of a solved run, strong to weak.

    A "row" is one strength for each site: the chosen ones, or those that all sites have one step stronger or weaker.

    Args:
        sites: The entries of the sites in metrics.json["path"].
        score: Name of the main score.
        exact: The probes are the closed form of least squares, which needs no certificates.
    """

    sites: list[SiteStrengths]
    score: str
    exact: bool = False

    def neighbours(self) -> dict[str, Tensor]:
        """Return the rows "stronger", "chosen" and "weaker": the index i64[S] into `solved` at each site.

        A site whose choice is at the end of its strengths has no neighbour there and keeps its choice. A row in which
        all sites do is left out.
        """
        solved = self.solved
        chosen = []
        for site, solved_at_site in zip(self.sites, solved, strict=True):
            index = site["strengths"].index(site["chosen"])
            chosen.append(solved_at_site.index(index))
        chosen_row = torch.tensor(chosen)
        last = len(solved[0]) - 1  # all sites have as many solved strengths
        rows = {}
        for name, step in ROWS.items():
            row = chosen_row.add(step).clamp(0, last)
            if name == "chosen" or (row != chosen_row).any():
                rows[name] = row
        return rows

    @property
    def solved(self) -> list[list[int]]:
        """Indices of the R solved strengths of each site."""
        indices = []
        for site in self.sites:
            scores = site[self.score]
            indices.append([i for i, score in enumerate(scores) if score is not None])
        return indices

    def unconverged(self, row: Tensor, sites: list[int]) -> dict[str, CertificateEntry | None]:
        """Return the certificates of a row i64[S] that do not hold at these sites, by name: None if nothing is known.

        There are none of least squares, which needs no certificates.
        """
        if self.exact:
            return {}
        unconverged = {}
        for index in sites:
            site = self.sites[index]
            certificate = None
            if site.get("certificates"):
                solved = self.solved[index]
                certificate = site["certificates"][solved[int(row[index])]]
            if not certificate or not certificate.get("converged"):
                unconverged[site["site"]] = certificate
        return unconverged


def is_at_end(strengths: list[float], lowest: float) -> bool:
    """Return whether the strength of the lowest loss is the first or the last of several that were tried."""
    return len(strengths) > 1 and lowest in (strengths[0], strengths[-1])
