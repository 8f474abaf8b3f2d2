"""How often planted effects are supported beside two, three, ... random LLMs, and two permuted ones.

    python -m experiments.toy.calibrate --studies planted --seeds 10 11 ...
    python -m experiments.toy.power --seeds 10 11 12

Solves probes of the planted models of seeds that `make calibrate` has made, beside as many draws as are asked for.
Prints, for each claim that is true, its mean effect beyond random, and in how many seeds it is supported by draws.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from experiments.toy.calibrate import DESIGNS, study_settings
from probes.report.claims import evaluate_claims
from probes.runs.study import group_runs, read_study
from probes.studies.arms import PERMUTED_DRAWS
from probes.studies.run import run_study


def study(folder: Path, seed: int, draws: int) -> dict[tuple[str, int], tuple[bool, float]]:
    """Return whether each planted claim is supported, and its effect beyond random, by claim and number of draws."""
    permuted = [f"permuted{draw}" for draw in range(PERMUTED_DRAWS)]
    random = [f"random{draw}" for draw in range(draws)]
    out = folder / "power"
    design = DESIGNS["planted"]._replace(arms=("trained", *random, *permuted))
    run_study(study_settings(folder, out, seed, design, fit=False))
    judged = {}
    for number in range(2, draws + 1):
        names = ("trained", *random[:number], *permuted)
        runs = [run for run in read_study(str(out)) if run.path.name in names]
        for claim in evaluate_claims(group_runs(runs)[0]):
            if claim.get("truth") == "planted":
                name = f"{claim['claim']} ({claim['image_attention']})"
                effect = claim["verdicts"]["beyond_random"]["value"]
                judged[name, number] = (claim["supported"], effect)
    return judged


def main() -> None:
    """Print a row for each claim."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/calibrate"),
        metavar="DIR",
        help="of `make calibrate`",
    )
    parser.add_argument("--seeds", type=int, nargs="+", required=True, metavar="N")
    parser.add_argument("--draws", type=int, default=5, metavar="D")
    args = parser.parse_args()
    rows = defaultdict(list)
    for seed in args.seeds:
        for key, judged in study(args.out / f"seed{seed}", seed, args.draws).items():
            rows[key].append(judged)
    numbers = range(2, args.draws + 1)
    listed = ", ".join(map(str, numbers))
    print(f"claim                            effect  supported beside {listed}")
    for claim in dict.fromkeys(claim for claim, _ in rows):
        counts = [sum(supported for supported, _ in rows[claim, number]) for number in numbers]
        most_draws = rows[claim, args.draws]
        effect = sum(value for _, value in most_draws) / len(args.seeds)
        print(f"{claim:<32} {100 * effect:+6.1f}  {', '.join(map(str, counts))}")


if __name__ == "__main__":
    main()
