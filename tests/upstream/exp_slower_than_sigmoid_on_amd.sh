#!/usr/bin/env bash
# Workaround: probes/ops/cross_entropy.py computes in base 2.
#
# On a processor of AMD, torch.exp takes longer than torch.sigmoid, which has an exponential in it.
#
# Guess: exp is the cheapest of these functions; exp2 is at most as fast, and sigmoid and tanh take an exp and a division.
# Found (torch 2.13.0, float32, one thread, AMD EPYC of Zen 4 with AVX-512): exp takes 2.9 times as long as exp2 and 2.1
# times as long as sigmoid; tanh takes 1.7 times as long as 2 sigmoid(2 x) - 1 in four steps. PyTorch calls the vector
# library of Intel's MKL for exp, log, sin and tanh (vml.h in ATen), and code of its own for exp2 and sigmoid.
# Who meets it: whoever computes a softmax or its logarithm from exp on such a CPU. In base 2, with logits that are
# multiplied by log2(e) once, the exponential takes a third of the time.
#
# Needs Python >= 3.10 and a network; works in a temporary folder. Judges processors of AMD only, and fails if the
# behaviour has changed there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 numpy==2.3.5

cat >times.py <<'PY'
import statistics
import time
from pathlib import Path

import torch

torch.set_num_threads(1)
x = -8 * torch.rand(2**18, generator=torch.Generator().manual_seed(0))
functions = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "2 sigmoid(2 x) - 1": lambda x: torch.sigmoid(2 * x).mul_(2).sub_(1),
}


def nanoseconds(function):
    """Return the CPU time of an element, of 40 calls."""
    started = time.process_time()
    for _ in range(40):
        function(x)
    return (time.process_time() - started) / 40 / x.numel() * 1e9


rounds = [{name: nanoseconds(function) for name, function in functions.items()} for _ in range(7)]
took = {name: statistics.median(each[name] for each in rounds) for name in functions}
maker = "AMD" if "AuthenticAMD" in Path("/proc/cpuinfo").read_text() else "not AMD"
print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {maker}:")
for name, ns in took.items():
    print(f"  {name:<20} {ns:.2f} ns")
same = torch.allclose(functions["2 sigmoid(2 x) - 1"](x), torch.tanh(x), rtol=0, atol=1e-6)
assert same, "both are tanh"
if maker == "AMD":
    assert took["exp"] > 1.5 * took["exp2"], "the behaviour has changed"
    assert took["exp"] > 1.2 * took["sigmoid"], "the behaviour has changed"
    assert took["tanh"] > 1.2 * took["2 sigmoid(2 x) - 1"], "the behaviour has changed"
PY
env/bin/python times.py
