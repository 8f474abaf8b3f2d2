"""Controls of a study: which run is which control, in whatever order they are passed, and where they are compared."""

from itertools import permutations
from pathlib import Path

import pytest
import tiny_models
from probe_runs import write_run, write_solved
from safetensors.torch import load_file, save_file

from probes.report.claims import evaluate_claims
from probes.report.page import write_report
from probes.report.study import read_studies

CURVE = [0.5, 0.4, 0.5, 0.6, 0.7, 0.7]  # encoder, adapter, layers 1 to 3, final norm
FLAT = [0.5, 0.4, 0.4, 0.4, 0.4, 0.4]
MASKS = ("causal", "bidirectional")


@pytest.fixture
def write(tmp_path):
    root = tiny_models.write_segmentation(tmp_path / "data", 1, 1)

    def write(name: str, quality: list[float], seed: int = 0, *, mask: str = "causal", solved: bool = False, **metrics):
        path = tmp_path / f"{mask}_{name}"
        if solved:
            return write_solved(path, [quality] * 3, root=root, mask=mask, seed=seed, metrics=metrics)
        return str(write_run(path, quality, root=root, mask=mask, seed=seed, metrics=metrics))

    return write


def set_accuracy_of_patch_0(run: str, accuracy: list[float]) -> None:
    """Give every site another pixel accuracy under the first patch."""
    file = Path(run) / "counts.safetensors"
    tensors = load_file(file)
    for site, share in enumerate(accuracy):
        tensors["patch_right"][site, :, 0] = (tensors["patch_valid"][:, 0] * share).long()
    save_file(tensors, file)


def test_starvation_of_a_model_and_its_controls_is_compared_at_one_layer(write):
    """Solved and trained probes have their best layers elsewhere; all solved runs have the same gaps at each layer."""
    peaks = {"trained": [0.5, 0.4, 0.5, 0.9, 0.7, 0.7], "solved": [0.5, 0.4, 0.9, 0.7, 0.6, 0.6]}
    runs = []
    for mask in MASKS:
        runs.append(write("trained", peaks["trained"], mask=mask))
        random = {"untrained": ["llm"], "match": "update"}
        solved = [write("solved", peaks["solved"], 5, mask=mask, solved=True)]
        solved += [write(f"r{i}", peaks["solved"], 7 + i, mask=mask, solved=True, **random, draw=i) for i in (0, 1)]
        for run in solved:
            gap = [0, 0, 0.1, 0.3, 0, 0] if mask == "bidirectional" else [0] * 6
            set_accuracy_of_patch_0(run, [0.3 + x for x in gap])
        runs += solved
    (study,) = read_studies(runs)
    assert study.trained["causal"].peak_layer == "layer_02" and study.solved["causal"].peak_layer == "layer_01"
    (claim,) = [claim for claim in evaluate_claims(study) if claim["claim"] == "starvation"]
    assert claim["verdicts"]["optimum"]["value"] == pytest.approx(0.1, abs=0.01)
    beyond = claim["verdicts"]["beyond_random"]
    assert beyond["value"] == pytest.approx(0, abs=1e-9) and beyond["verdict"] == "does not hold"


@pytest.mark.parametrize("part", ["llm", "adapter"])
def test_draws_are_paired_by_their_number(part, write, tmp_path):
    """Under one mask there is a draw that the other lacks, and runs are passed in another order."""
    control = {"untrained": [part], "match": "update" if part == "llm" else "none"}
    trained = [write("trained", CURVE, mask=mask) for mask in MASKS]
    draws = {"causal": (0, 2, 1), "bidirectional": (1, 2)}
    random = [write(f"r{i}", FLAT, 3 + i, mask=mask, **control, draw=i) for mask in MASKS for i in draws[mask]]
    expected = [{"causal"}, {"causal", "bidirectional"}, {"causal", "bidirectional"}]
    for order in (trained + random, trained + random[::-1]):
        (study,) = read_studies(order)
        found = study.random_draws(part, solved=False)
        assert [set(runs) for runs in found] == expected
        assert all({run.metrics["draw"] for run in runs.values()} == {i} for i, runs in enumerate(found))
    claims = write_report(order, tmp_path / "report")["claims"]
    compared = "recovery" if part == "llm" else "adapter_drop"
    by_mask = {c["image_attention"]: c["verdicts"]["beyond_random"] for c in claims if c["claim"] == compared}
    assert {mask: column["draws"] for mask, column in by_mask.items()} == {"causal": 3, "bidirectional": 2}


def test_the_untrained_model_is_the_same_control_in_any_order(write):
    """A trained LLM behind a random adapter is none, nor is a second draw."""
    runs = [write("trained", CURVE), write("untrained", FLAT, 1, untrained=["adapter", "llm"], draw=0)]
    runs += [write("again", FLAT, 2, untrained=["adapter", "llm"], draw=1)]
    runs += [write(f"adapter{i}", CURVE, 3 + i, untrained=["adapter"], draw=i) for i in (0, 2)]
    for order in permutations(runs):
        (study,) = read_studies(order)
        assert study.control("causal").path == Path(runs[1])
        draws = [draw["causal"].metrics["draw"] for draw in study.random_draws("adapter", solved=False)]
        assert draws == [0, 1, 2], "one adapter of each draw"
    with pytest.raises(ValueError, match="are both the untrained run under 'causal'"):
        read_studies([*runs, write("twice", FLAT, 8, untrained=["adapter", "llm"], draw=0)])
