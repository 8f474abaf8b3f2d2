"""The binding world in small, for the tests of this folder."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from probes.config import AssetsOptions
from probes.worlds import assets


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Return a folder of pictures of two scenes, written in this process: a new one takes longer to start."""
    out = tmp_path_factory.mktemp("world") / "assets"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
        options = AssetsOptions(out=out, seed=1, scale=0.01, scenes=2)
        assets.run(options)
    return out
