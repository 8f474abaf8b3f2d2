"""Fixtures that several test files share."""

import os
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach out
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")  # here and in the processes that tests start

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels then run without a GPU

import tiny_models

SHARED = Path(__file__).parents[2] / "shared" / "data"


# HYPOTHESIS_PROFILE=long looks for counterexamples for many minutes, and for other ones each time.
patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}  # machines may be busy
hypothesis.settings.register_profile("ci", max_examples=100, derandomize=True, **patient)
hypothesis.settings.register_profile("long", max_examples=5000, **patient)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config):
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """(Encoder, path of the LLM): a tiny CLIP and a tiny Llama on disk."""
    return tiny_models.write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Tiny exported MLLMs by mask."""
    masks = ("causal", "bidirectional", "prefix")
    return {mask: tiny_models.write_checkpoint(tmp_path_factory.mktemp(mask), mask) for mask in masks}


@pytest.fixture(scope="session")
def segmentation(tmp_path_factory) -> Path:
    return tiny_models.write_segmentation(tmp_path_factory.mktemp("segmentation"))


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    return tiny_models.write_conversations(tmp_path_factory.mktemp("conversations"))


@pytest.fixture(scope="session")
def real_tokenizer():
    """The tokenizer of Vicuna, which is Llama's."""
    from transformers import AutoTokenizer

    if not (SHARED / "llama_tokenizer").is_dir():
        pytest.skip(f"{SHARED / 'llama_tokenizer'} is not there; it holds the real Llama tokenizer")
    return AutoTokenizer.from_pretrained(SHARED / "llama_tokenizer")
