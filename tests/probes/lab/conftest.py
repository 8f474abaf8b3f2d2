"""A lab of two tiny runs, shared by the tests of this folder."""

import labs
import pytest

from probes.lab.session import Session


@pytest.fixture(scope="session")
def lab_runs(checkpoints, tmp_path_factory) -> list[str]:
    return labs.fit_runs(checkpoints, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def session(lab_runs) -> Session:
    return labs.open_session(lab_runs)


@pytest.fixture(scope="module")
def port(session):
    with labs.serve(session) as port:
        yield port


@pytest.fixture
def open_tab(chromium, port):
    with labs.browser_tabs(chromium, port) as open_tab:
        yield open_tab
