"""Files of `--import`, which a process imports once and never forgets: tests forget them."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llava_bidir
from llava_bidir.common import errors, imports
from probes.analyses import ANALYSES, MEASURED
from probes.analyses.claims import ANALYSIS_OF, CLAIMS
from probes.data.registry import LAYOUTS
from probes.heads import HEADS
from probes.models.families import FAMILIES
from probes.tasks import TASKS

EXAMPLES = Path(__file__).parents[1] / "extending"
REGISTRIES = (
    *(llava_bidir.IMAGE_ATTENTION, HEADS, LAYOUTS, *LAYOUTS.values(), FAMILIES, TASKS),
    *(ANALYSES, MEASURED, CLAIMS, ANALYSIS_OF),
)


OF_TESTS = f"{tempfile.gettempdir()}/pytest-of-"


def forget_files_of_tests() -> None:
    """Forget modules and folders of other tests' files: models FILE.py:FUNCTION are never forgotten either."""
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", "")).startswith(OF_TESTS):
            del sys.modules[name]
    sys.path[:] = [folder for folder in sys.path if not folder.startswith(OF_TESTS)]


@contextmanager
def forgotten() -> Iterator[None]:
    """Forget at the end of the block what was registered and imported in it."""
    forget_files_of_tests()
    registered = [dict(registry) for registry in REGISTRIES]
    files = [*imports._files], [*errors.USER_FILES]
    path, modules = [*sys.path], set(sys.modules)
    try:
        yield
    finally:
        for file in errors.USER_FILES[len(files[1]) :]:
            if (name := Path(file).stem) not in modules:
                sys.modules.pop(name, None)
        for registry, entries in zip(REGISTRIES, registered, strict=True):
            for name in registry.keys() - entries.keys():
                del registry[name]
        imports._files[:], errors.USER_FILES[:] = files
        sys.path[:] = path
