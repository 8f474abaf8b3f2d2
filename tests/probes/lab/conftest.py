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
    server = f"http://127.0.0.1:{port}/"
    address = f"{server}?token={labs.TOKEN}"
    with labs.browser_tabs(chromium, address, (server, "data:", "blob:")) as open_tab:
        yield open_tab
