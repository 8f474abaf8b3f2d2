"""Run transformers' own LLaVA tests on our class under each mask, and compare the outcomes with the stock class.

    make test-peers                             # clones the tests of the installed version from GitHub, once
    make test-peers TRANSFORMERS=/path/to/repo  # from another clone, where GitHub cannot be reached

The clone lies in runs/peers. The source distribution on PyPI has no tests of models. About two minutes per mask.
"""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import transformers

REPOSITORY = os.environ.get("TRANSFORMERS") or "https://github.com/huggingface/transformers"
TAG = f"v{transformers.__version__}"
FOLDER = Path("runs/peers") / TAG
FOLDERS = ["tests/generation", "tests/exporters", "tests/models/llava", "tests/utils", "utils"]
TESTS = Path(__file__).parent / "llava_suite.py"
MASKS = ("causal", "bidirectional", "prefix")

# {test: (outcome of our class, reason)}; the stock class passes each of them.
EXPECTED = {
    "test_inherits_generation_mixin": (
        "failed",
        "wants GenerationMixin among the direct bases; ours inherits it",
    ),
    "test_can_init_all_missing_weights": (
        "failed",
        "for classes outside of transformers, weights of CLIP that a checkpoint lacks are drawn with another scale; "
        "load_weights refuses such checkpoints",
    ),
    "test_torch_save_load": (
        "skipped",
        "reads the class from transformers' own table of base models",
    ),
}


def fetch() -> None:
    """Clone the folders with the tests, without history."""
    if FOLDER.exists():
        return
    partial = FOLDER.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    clone = f"git -c advice.detachedHead=false clone --quiet --depth 1 --branch {TAG} --sparse"
    command = [*clone.split(), "--filter=blob:none", REPOSITORY, str(partial)]
    if subprocess.run(command).returncode:
        sys.exit(
            f"cannot clone {TAG} of {REPOSITORY}. Without a network, clone it elsewhere (git clone --branch {TAG} "
            "https://github.com/huggingface/transformers) and pass its folder: make test-peers TRANSFORMERS=file://DIR"
        )
    subprocess.run(["git", "-C", str(partial), "sparse-checkout", "set", *FOLDERS], check=True)
    (partial / "src").mkdir()  # the tests look there for the package
    (partial / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(partial / "site")]
    subprocess.run(
        [*pip, "httpx", "parameterized"], check=True
    )  # the tests import them beyond our own requirements
    partial.rename(FOLDER)


def outcomes(mask: str) -> dict[str, str]:
    """Run the tests under a mask, or on the stock class, and return {test: passed, failed or skipped}."""
    shutil.copy(TESTS, FOLDER / "tests" / "models" / "llava")
    paths = os.pathsep.join(str(path.resolve()) for path in (FOLDER / "site", Path()))
    environment = os.environ | {
        "IMAGE_ATTENTION": mask,
        "PYTHONPATH": paths,
        "RUN_SLOW": "1",
        "HF_HUB_OFFLINE": "1",
    }
    report = f"{mask}.xml"
    options = "-q --noconftest --config-file=/dev/null --rootdir=. -p no:cacheprovider -W ignore"
    with open(FOLDER / f"{mask}.log", "w") as log:
        command = [sys.executable, "-m", "pytest", *options.split(), f"--junitxml={report}"]
        command.append(f"tests/models/llava/{TESTS.name}")
        status = subprocess.run(
            command, cwd=FOLDER, env=environment, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    if status not in (0, 1):  # 1: some tests failed
        sys.exit(f"the tests could not run; see {FOLDER / mask}.log")
    results = {}
    for case in ElementTree.parse(FOLDER / report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "skipped" if "skipped" in kinds else "passed"  # so is an expected failure
        results[case.get("name")] = "failed" if kinds & {"failure", "error"} else outcome
    return results


def main() -> int:
    """Print the number of tests by outcome and each difference; return 1 if one is not expected."""
    fetch()
    stock = outcomes("stock")
    wrong = 0
    print(f"transformers {TAG}, {len(stock)} tests\n  stock: {dict(Counter(stock.values()))}")
    for mask in MASKS:
        ours = outcomes(mask)
        print(f"  {mask}: {dict(Counter(ours.values()))}")
        for test in sorted(stock.keys() | ours.keys()):
            got = ours.get(test)
            expected = EXPECTED.get(test, (stock.get(test),))[0]
            if got != expected:
                wrong += 1
                print(f"    {test}: {got}, expected {expected}; see {FOLDER / mask}.log")
    for test, (outcome, reason) in EXPECTED.items():
        print(f"  expected: {test} {outcome}: {reason}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
