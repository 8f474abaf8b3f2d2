"""Fixtures that several test files share."""

import gc
import os
import shutil
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach out
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["OMP_NUM_THREADS"] = os.environ.get(
    "TEST_THREADS", "1"
)  # here and in the processes that tests start
os.environ.setdefault(
    "NUMBA_DISABLE_JIT", "1"
)  # compiling UMAP takes 28 s; `make test-nightly` does it once

import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when triton is imported: kernels then run without a GPU

import llama_tokenizers
import promises
import tiny_models

from llava_bidir.common.tokenizer import load_tokenizer

# A folder with `llama_tokenizer` (Llama's tokenizer.model), which adds tests on it.
TEST_DATA = os.environ.get("LLAVA_BIDIR_TEST_DATA")

# HYPOTHESIS_PROFILE=long looks for counterexamples for many minutes, and for other ones each time.
patient = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}  # machines may be busy
hypothesis.settings.register_profile("ci", max_examples=50, derandomize=True, **patient)
hypothesis.settings.register_profile("long", max_examples=5000, **patient)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# Files that take longest, of all tiers. They come first, so that no worker waits long for another one at the end.
LONGEST = (
    "tests/test_demo.py",
    "tests/real/test_real.py",
    "tests/slurm/test_cluster.py",
    "tests/llava_bidir/training/test_strategies.py",
    "tests/probes/studies/test_study.py",
    "tests/test_pretended_gpu.py",
    "tests/probes/test_faults.py",
    "tests/probes/fit/test_distributed.py",
    "tests/llava_bidir/training/test_faults.py",
    "tests/llava_bidir/training/test_resume.py",
    "tests/test_documents.py",
    "tests/test_memory.py",
    "tests/test_wheel.py",
    "tests/test_cli.py",
    "tests/probes/models/test_answers_of_families.py",
    "tests/llava_bidir/model/test_llms.py",
    "tests/probes/report/test_conclusions.py",
)


def pytest_configure(config):
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_finish():
    gc.freeze()  # what has been imported lives to the end: the collector need not look at it again


def pytest_collection_modifyitems(items):
    place = {file: i for i, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.split("::")[0], len(place)))


def _fail_if_promised(report, nodeid: str) -> None:
    """Turn a skipped test, or file, into a failed one if CI runs and tests/README.md promises it."""
    if not os.environ.get("CI") or not report.skipped or hasattr(report, "wasxfail"):
        return
    if promises.is_promised(nodeid):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = (
            f"{nodeid} proves a promise of tests/README.md, so CI must not skip it. {reason}"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _fail_if_promised(report, item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _fail_if_promised(report, collector.nodeid)
    return report


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo in full: that of DEMO=FOLDER, as in `make test-nightly`, or runs/demo."""
    folder = Path(os.environ.get("DEMO") or Path(__file__).parents[1] / "runs/demo").absolute()
    if not (folder / "report/results.json").is_file():
        pytest.skip(f"no finished demo in {folder}: make demo")
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """(Encoder, path of the LLM): a tiny CLIP and a tiny Llama on disk."""
    return tiny_models.write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Tiny exported MLLMs by mask."""
    masks = ("causal", "bidirectional", "prefix")
    return {
        mask: tiny_models.write_checkpoint(tmp_path_factory.mktemp(mask), mask) for mask in masks
    }


@pytest.fixture(scope="session")
def segmentation(tmp_path_factory) -> Path:
    return tiny_models.write_segmentation(tmp_path_factory.mktemp("segmentation"))


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    return tiny_models.write_conversations(tmp_path_factory.mktemp("conversations"))


@pytest.fixture(scope="session", params=["trained", "real"] if TEST_DATA else ["trained"])
def llama_folder(request, tmp_path_factory) -> Path:
    """A folder with a `tokenizer.model` of Llama's kind, as the hub has Vicuna's."""
    if request.param == "real":
        return Path(TEST_DATA) / "llama_tokenizer"
    return llama_tokenizers.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def llama_tokenizer(llama_folder):
    """The tokenizer of Vicuna, which is Llama's, as training loads it."""
    return load_tokenizer("model.llm", str(llama_folder))


@pytest.fixture(scope="session")
def slow_llama(llama_folder):
    """The same tokenizer by the sentencepiece package, as LLaVA uses it."""
    return llama_tokenizers.SlowLlama(llama_folder)


@pytest.fixture(scope="module")
def chromium():
    """The machine's Chromium, driven by Playwright."""
    driver = pytest.importorskip(
        "playwright.sync_api", reason="playwright (extra: browser) is not installed"
    )
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        pytest.skip("no Chromium on this machine")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
