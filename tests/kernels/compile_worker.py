"""Compile the attention kernels of one head width for sm_90; print registers and memory as JSON.

python tests/kernels/compile_worker.py 64
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_stable.kernels.attention import BLOCKS
from hf_stable.kernels.attention_backward import key_value_kernel, query_kernel
from hf_stable.kernels.attention_forward import forward_kernel

KERNELS: dict[str, Any] = {
    "forward": forward_kernel,
    "query": query_kernel,
    "key_value": key_value_kernel,
}
# (cap, clip, documents, statistics)
FORMS = {
    "plain": (False, False, False, False),
    "cap": (True, False, False, False),
    "cap, statistics": (True, False, False, True),
    "clip": (False, True, False, False),
    "cap, clip, documents": (True, True, True, False),
}
SINGLE = {"lse", "rows", "delta"}
NUMBERS = {"scaling", "tanh_scale", "score_scale", "gamma", "zeta", "alpha"}
TENSORS = {"q", "k", "v", "documents", "o", "w", "grad_o", "grad_q", "grad_k", "grad_v", *SINGLE}


def source(name: str, width: int, form: tuple[bool, bool, bool, bool]) -> tuple[Any, Any]:
    """The kernel's source with its types, in bf16, as a training step would specialise it."""
    cap, clip, documents, statistics = form
    columns = triton.next_power_of_2(width)
    blocks = BLOCKS[name, columns, clip]
    constants: dict[str, Any] = {
        "GROUPS": 1, "CAP": cap, "CLIP": clip, "DOCUMENTS": documents, "FAST_TANH": False,
        "D": width, "COLS": columns, "M": blocks.M, "N": blocks.N,
    }  # fmt: skip
    if name == "forward":
        constants |= {"STATIC_MAX": cap, "STATS": statistics}
        constants |= {} if clip else {"w": None}
    constants |= {} if documents else {"documents": None}
    kernel = KERNELS[name]
    types, values, hints = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            types[argument], values[index,] = "constexpr", constants[argument]
        elif argument in TENSORS:
            element = "i32" if argument == "documents" else "fp32"
            element = element if argument in {*SINGLE, "documents"} else "bf16"
            types[argument], hints[index,] = f"*{element}", [["tt.divisibility", 16]]
        elif argument in NUMBERS:
            types[argument] = "fp32"
        else:
            types[argument] = "i32"
            if argument != "H":
                hints[index,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, types, values, hints), blocks


def measure(name: str, width: int, form: tuple[bool, bool, bool, bool]) -> dict[str, int]:
    """Registers a thread, bytes spilled and bytes of shared memory."""
    kernel, blocks = source(name, width, form)
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    compiled = triton.compile(kernel, target=GPUTarget("cuda", 90, 32), options=options)
    ptxas = Path(nvidia.__file__).parent / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [str(ptxas), "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (
        int(re.findall(pattern, text)[-1])
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
    return {"registers": registers, "spilled": spilled, "shared": compiled.metadata.shared}


if __name__ == "__main__":
    width = int(sys.argv[1])
    found = {
        f"{name} ({label})": measure(name, width, form)
        for name in KERNELS
        for label, form in FORMS.items()
    }
    print(json.dumps(found, indent=1))
