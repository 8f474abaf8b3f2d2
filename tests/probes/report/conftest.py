"""Studies of random counts that the tests of the report write."""

import probe_runs
import pytest
import tiny_models


@pytest.fixture
def write(tmp_path):
    """Write a run by name; solved ones have the same accuracies at all strengths, unless `curves` says otherwise."""
    root = tiny_models.write_segmentation(tmp_path / "data", 1, 1)

    def write(
        name,
        quality,
        number=0,
        *,
        mask="causal",
        solved=False,
        curves=None,
        images=40,
        sites=None,
        **metrics,
    ) -> str:
        path = tmp_path / f"{mask}_{name}"
        options = {
            "root": root,
            "mask": mask,
            "seed": number,
            "metrics": metrics,
            "images": images,
        }
        options["sites"] = sites
        if solved:
            return probe_runs.write_solved(path, curves or [quality] * 3, **options)
        return str(probe_runs.write_run(path, quality, **options))

    return write


@pytest.fixture
def draws(write):
    """Write random and permuted LLMs, solved, one of both for each curve; with step 0 they have equal counts."""

    def draws(
        *curves,
        mask="causal",
        first=20,
        step=1,
        matches=("update", "permuted"),
    ) -> list[str]:
        return [
            write(
                f"{match[0]}{i}",
                curve,
                first + step * i,
                mask=mask,
                solved=True,
                untrained=["llm"],
                match=match,
                draw=i,
            )
            for match in matches
            for i, curve in enumerate(curves)
        ]

    return draws
