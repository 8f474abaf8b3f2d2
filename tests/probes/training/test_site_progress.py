"""Solving a site moves the bar before the site is solved, also from the processes that solve several."""

import time

import pytest
import torch

from llava_bidir.common.step_progress import watched
from probes.training.solve import site_progress
from probes.training.solve.site_progress import SiteProgress, count_minimisation, follow
from probes.training.solve.solver import in_workers


@pytest.fixture
def told(monkeypatch):
    """What watchers are told: part, units that are done, and all of them."""
    monkeypatch.setattr(site_progress, "POLL_S", 0.01)
    told = []
    with watched(lambda *progress: told.append(progress) or "about 1 min left"):
        yield told


def work(site: str) -> str:
    for _ in range(5):
        count_minimisation()
    time.sleep(0.2)
    return site.upper()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_site_that_is_half_solved_is_half_of_one(threads, told, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = dict(in_workers(work, ["a", "b"], torch.device("cpu")))
    assert found == {"a": "A", "b": "B"}
    shares = [done for part, done, total in told if (part, total) == ("solving sites", 2)]
    assert shares == sorted(shares) and shares[-1] == 2
    between = {0.5, 1.0} if threads == 2 else {0.5}
    assert between & {*shares}, "five minimisations of the ten that are expected of a site"


def test_sites_that_are_solved_say_how_many_minimisations_others_need():
    progress = SiteProgress(3)
    for site, count in enumerate((8, 4, 40)):
        progress.begin(site)
        for _ in range(count):
            count_minimisation()
    assert progress.done == pytest.approx(0.8 + 0.4 + 0.95), "never all of one before it ends"
    progress.end(0)
    assert progress.done == pytest.approx(1 + 0.5 + 0.95)


def test_an_error_in_a_worker_ends_the_bar(told, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def fail(site: str) -> None:
        raise ZeroDivisionError(site)

    with pytest.raises(ZeroDivisionError):
        dict(in_workers(fail, ["a"], torch.device("cpu")))
    count = len(told)
    time.sleep(0.1)
    assert len(told) == count, "no thread is left"


def test_batches_of_a_pass_are_told_and_shown(told, capsys):
    assert [*follow("abc", 3, "pass 2", hidden=False)] == ["a", "b", "c"]
    assert told == [("pass 2", i, 3) for i in (1, 2, 3)]
    assert "pass 2: 100%" in capsys.readouterr().err
