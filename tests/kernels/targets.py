"""Compile kernels for NVIDIA GPUs without one; print what ptxas says of them as JSON.

    python -m tests.kernels.targets attention 64            # a head width, for sm_90
    python -m tests.kernels.targets attention 64 100        # for sm_100
    python -m tests.kernels.targets attention 64 90 all     # in all forms
    python -m tests.kernels.targets head 256000,50257       # vocabularies

Triton cross-compiles and brings its own ptxas. Interpreted kernels cannot be compiled in the same
process, so TRITON_INTERPRET must not be set.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_stable.kernels.attention_backward import key_value_kernel, query_kernel
from hf_stable.kernels.attention_forward import forward_kernel
from hf_stable.kernels.blocks import choose_blocks

ATTENTION: dict[str, Any] = {
    "forward": forward_kernel,
    "query": query_kernel,
    "key_value": key_value_kernel,
}
# (cap, clip, documents, statistics)
FORMS = {
    "plain": (False, False, False, False),
    "cap": (True, False, False, False),
    "cap, fast tanh": (True, False, False, False),
    "cap, statistics": (True, False, False, True),
    "cap, documents, statistics": (True, False, True, True),
    "clip": (False, True, False, False),
    "cap, clip, documents": (True, True, True, False),
}
# Statistics are the forward kernel's affair: to the others this form is "cap".
FORWARD_ONLY = "cap, statistics"
# Every branch of the kernels, in every tile size, and each of the other forms within one of these.
BRANCHES = ("plain", "cap, fast tanh", "cap, documents, statistics", "cap, clip, documents")
TYPES = {
    **dict.fromkeys(("q", "k", "v", "o", "w", "grad_o", "grad_q", "grad_k", "grad_v"), "*bf16"),
    **dict.fromkeys(("lse", "rows", "delta", "p_cross_entropy", "p_squared_log_z"), "*fp32"),
    **dict.fromkeys(("scaling", "tanh_scale", "score_scale", "gamma", "zeta", "alpha"), "fp32"),
    **dict.fromkeys(("cap", "inverse_cap", "z_loss"), "fp32"),
    "documents": "*i32",
    "p_labels": "*i64",
}
# Integers that are no multiples of 16; all other ones are, in what is worth being fast.
ODD = {"H", "stride", "V"}
# Compute capability times ten.
CAPABILITY = int(sys.argv[3]) if len(sys.argv) > 3 else 90
PTXAS = Path(nvidia.__file__).parent / "bin" / ("ptxas-blackwell" if CAPABILITY >= 100 else "ptxas")


# What ptxas says is printed, so that it need not run twice; what comes from Triton's cache did not
# run it at all.
knobs.nvidia.dump_ptxas_log = True


def assemble(ptx: str) -> str:
    """Run ptxas and return what it says."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        architecture = re.findall(r"\.target (\w+)", ptx)[0]
        command = [PTXAS, "-v", f"-arch={architecture}", file, "-o", file.with_suffix(".cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def measure(
    kernel: Any, constants: dict[str, Any], launch: dict[str, int], types: dict[str, str]
) -> dict[str, Any]:
    """Registers a thread, bytes spilled, bytes of shared memory, and global loads by width."""
    signature, values, hints = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[index,] = "constexpr", constants[name]
            continue
        signature[name] = {**TYPES, **types}.get(name, "i32")
        if signature[name] != "fp32" and name not in ODD:
            hints[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, hints)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=launch)
    ptx = compiled.asm["ptx"]
    said = printed.getvalue() or assemble(ptx)
    loads = re.findall(r"ld\.global\S*", ptx)
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[-1]),
        "spilled": int(re.findall(r"(\d+) bytes spill stores", said)[-1]),
        "shared": compiled.metadata.shared,
        "vector_loads": sum(".v4.b32" in load for load in loads),
        "other_loads": sum(".v4.b32" not in load for load in loads),
        "matrix_products": len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
    }


def attention(width: int) -> dict[str, dict[str, Any]]:
    """All kernels of one head width, in bf16, in the forms of BRANCHES or in all."""
    columns, found = triton.next_power_of_2(width), {}
    forms = FORMS if sys.argv[4:] == ["all"] else BRANCHES
    for name, kernel in ATTENTION.items():
        for label in forms:
            if name != "forward" and label == FORWARD_ONLY:
                continue
            cap, clip, documents, statistics = FORMS[label]
            blocks = choose_blocks(name, width, clip, torch.bfloat16, torch.device("cpu"))
            constants = {
                **{
                    "GROUPS": 1,
                    "CAP": cap,
                    "CLIP": clip,
                    "DOCUMENTS": documents,
                    "FAST_TANH": label == "cap, fast tanh",
                },
                **{"D": width, "COLS": columns, "M": blocks.M, "N": blocks.N},
                **({} if documents else {"documents": None}),
            }
            if name == "forward":
                constants |= {"STATIC_MAX": cap, "UNBIASED": False, "STATS": statistics}
                constants |= {} if clip else {"w": None}
            launch = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
            found[f"{name} ({label})"] = measure(kernel, constants, launch, {})
    return found


def head_rows(vocab: int) -> dict[str, dict[str, Any]]:
    """The head's row kernel: what trains on a GPU in all its forms, and the largest of the rest."""
    # Imported here: it takes Transformers, which attention need not wait for.
    from hf_stable.kernels import linear_cross_entropy as head  # noqa: PLC0415

    forms = [("bf16", True, True), ("bf16", False, True), ("bf16", True, False)]
    forms += [("fp16", True, True), ("fp32", True, True)]
    found = {}
    for dtype, capped, gradient in forms:
        shape = head.block_shape(vocab, vocab, 4 if dtype == "fp32" else 2)
        launch = {"num_warps": shape.pop("num_warps")}
        constants = {"CAPPED": capped, "GRADIENT": gradient, **shape}
        types = {"p_logits": f"*{dtype}"}
        label = f"{dtype}, capped {capped}, gradient {gradient}"
        found[label] = measure(head.cross_entropy_rows_kernel, constants, launch, types)
    return found


if __name__ == "__main__":
    measured = {"attention": attention, "head": head_rows}[sys.argv[1]]
    sizes = {size: measured(int(size)) for size in sys.argv[2].split(",")}
    print(json.dumps(sizes, indent=1))
