"""Every installed package with its licence: `make licences`, or `python tests/licences.py` in any environment.

A licence that nobody has looked at yet fails, be it an unusual one or a usual one under a new name.
"""

import re
import sys
from importlib.metadata import Distribution, distributions

PERMISSIVE = {  # SPDX's names
    *(
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CC0-1.0",
        "CNRI-Python",
        "ISC",
        "LLVM-exception",
    ),
    *("MIT", "MIT-CMU", "PSF-2.0", "Zlib"),
}
WEAK_COPYLEFT = {"MPL-2.0"}  # of its own files; we change none of them
OLDER_NAMES = {  # what metadata said before SPDX
    *("Apache", "Apache 2.0", "Apache 2.0 License", "Apache Software License", "Apache Software License 2.0"),
    *("3-Clause BSD License", "BSD", "BSD License", "CMU License (MIT-CMU)", "ISC License (ISCL)", "MIT License"),
    *("Academic Free License (AFL)", "Python Software Foundation License", "Unlicense"),
    "Mozilla Public License 2.0 (MPL 2.0)",
}
ALLOWED = PERMISSIVE | WEAK_COPYLEFT | OLDER_NAMES
OF_CUDA = re.compile("nvidia-|cuda-")  # not free; they come with a torch for GPUs, which runs on nothing else


def licences(package: Distribution) -> set[str]:
    """The names of a package's licences, all of them where it may be chosen; empty if it tells none."""
    facts = package.metadata
    classifiers = [name.split(" :: ") for name in facts.get_all("Classifier") or []]
    listed = {name[-1] for name in classifiers if name[0] == "License"} - {"OSI Approved"}
    if expression := facts.get("License-Expression") or (None if listed else facts.get("License")):
        return set(re.split(" AND | OR | WITH ", re.sub("[()]", "", expression)))
    return listed


def problem(package: Distribution) -> str | None:
    if OF_CUDA.match(package.name):
        return None
    found = licences(package)
    return f"not allowed: {', '.join(sorted(found - ALLOWED)) or 'none told'}" if not found or found - ALLOWED else None


if __name__ == "__main__":
    packages = sorted(distributions(), key=lambda package: package.name.lower())
    for package in packages:
        print(f"{package.name:26}{package.version:14}{', '.join(sorted(licences(package)))}")
    problems = [f"{package.name} {package.version}: {why}" for package in packages if (why := problem(package))]
    sys.exit("\n".join(problems) or None)
