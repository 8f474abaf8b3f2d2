"""Compiles the Triton kernels for Hopper, GPU or none, and prints {kernel: bytes of registers that it spills}."""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia
from triton.compiler import ASTSource

from probes.ops.kernels.argmax_counts import argmax_cell, count_cell
from probes.ops.kernels.grid_cells import PIXELS

TYPES = {"target": "*u8", "out": "*u8"}
TYPES |= dict.fromkeys(("logits", "row_fraction", "column_fraction"), "*fp32")
TYPES |= dict.fromkeys(
    ("row_start", "column_start", "intersection", "predicted", "patch_right"), "*i32"
)


def spilled(kernel, **constants) -> int:
    constants |= {"K": 256, "X": PIXELS}
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        assembler = Path(nvidia).parent / "bin" / "ptxas"
        command = [assembler, "-v", "-arch=sm_90a", ptx, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    return int(re.search(r"(\d+) bytes spill stores", said).group(1))


print(json.dumps({"count_cell": spilled(count_cell), "argmax_cell": spilled(argmax_cell)}))
