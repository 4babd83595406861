"""Compile the attention and head kernels for NVIDIA GPUs without one, and count their instructions.

    python scripts/bench/static.py                          # head width 64, sm_80, sm_90 and sm_100
    python scripts/bench/static.py --capability 90 --width 128 --forms all
    python scripts/bench/static.py --json static.json       # the numbers too, with versions

Triton cross-compiles and brings its own ptxas and nvdisasm. The tables say how many instructions a
warp executes in the regular loop (tiles that no mask touches; two loops of a clip's forward, all
tiles alive), and by `static_model.py` how many clocks a tile takes and which share of the tensor
cores' peak that allows. A packed instruction of sm_100 counts once. Nothing is timed.

Exit code 1: a kernel spills more than the bytes that `static_model.py` allows, does not fit the
shared memory, or has products that do not run on tensor cores.
"""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # Interpreted kernels cannot be compiled, and Triton decides at its import.
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from static_model import (
    CHIPS,
    PTX,
    SASS,
    Clocks,
    Loop,
    clocks,
    innermost,
    problems,
    programs,
    read_loops,
)
from triton import knobs
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_stable.kernels.attention_backward import key_value_kernel, query_kernel
from hf_stable.kernels.attention_forward import forward_kernel
from hf_stable.kernels.blocks import Blocks, choose_blocks
from hf_stable.kernels.tiles import tanh_terms
from hf_stable.records import git_revision, versions, write_json

KERNELS: dict[str, Any] = {
    "forward": forward_kernel,
    "query": query_kernel,
    "key_value": key_value_kernel,
}


class Form(NamedTuple):
    cap: bool = False
    clip: bool = False
    documents: bool = False
    statistics: bool = False
    fast: bool = False


FORMS = {
    "plain": Form(),
    "statistics": Form(statistics=True),
    "cap": Form(cap=True),
    "cap, fast tanh": Form(cap=True, fast=True),
    "cap, statistics": Form(cap=True, statistics=True),
    "cap, documents, statistics": Form(cap=True, documents=True, statistics=True),
    "clip": Form(clip=True),
    "cap, clip, documents": Form(cap=True, clip=True, documents=True),
}
# Every branch of the kernels, in every tile size, and each of the other forms within one of these.
BRANCHES = ("plain", "cap, fast tanh", "cap, documents, statistics", "cap, clip, documents")
# Forms that differ from another one in the forward only.
BACKWARD_OF = {"statistics": "plain", "cap, statistics": "cap"}
NUMBERS = ("fp32",) * len(tanh_terms(1.0, 1.0) or ())
TYPES: dict[str, Any] = {
    **dict.fromkeys(("q", "k", "v", "o", "w", "grad_o", "grad_q", "grad_k", "grad_v"), "*bf16"),
    **dict.fromkeys(("lse", "rows", "delta", "p_cross_entropy", "p_squared_log_z"), "*fp32"),
    **dict.fromkeys(("scaling", "tanh_scale", "score_scale", "gamma", "zeta", "alpha"), "fp32"),
    "tanh_terms": NUMBERS,
    **dict.fromkeys(("cap", "inverse_cap", "z_loss"), "fp32"),
    "documents": "*i32",
    "p_labels": "*i64",
}
# Integers that are no multiples of 16; all other ones are, in what is worth being fast.
ODD = {"H", "stride", "V"}
_TOOLS = Path(nvidia.__file__).parent / "bin"
_DISASSEMBLER = _TOOLS / "nvdisasm"
# What ptxas says is printed, so that it need not run twice; what comes from Triton's cache did not
# run it at all.
knobs.nvidia.dump_ptxas_log = True


def _run_tool(name: str, *options: str, content: bytes) -> subprocess.CompletedProcess[str]:
    """Run a tool of Triton's on a file of this content."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel"
        file.write_bytes(content)
        command = [_TOOLS / name, *options, file]
        if name.startswith("ptxas"):
            command += ["-o", file.with_suffix(".cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True)


def assemble(ptx: str, capability: int) -> str:
    """Run ptxas and return what it says."""
    architecture = re.findall(r"\.target (\w+)", ptx)[0]
    name = "ptxas-blackwell" if capability >= 100 else "ptxas"
    return _run_tool(name, "-v", f"-arch={architecture}", content=ptx.encode()).stderr


def compile_kernel(
    kernel: Any, constants: dict[str, Any], launch: dict[str, int], types: dict[str, str], sm: int
) -> tuple[dict[str, Any], list[Loop]]:
    """Compile for compute capability `sm` / 10; return what its assembler says, and its loops."""
    signature, values, hints = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[index,] = "constexpr", constants[name]
            continue
        signature[name] = {**TYPES, **types}.get(name, "i32")
        if signature[name] not in ("fp32", NUMBERS) and name not in ODD:
            hints[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, hints)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch)
    ptx, warps = compiled.asm["ptx"], launch["num_warps"]
    said = printed.getvalue() or assemble(ptx, sm)
    loads = re.findall(r"ld\.global\S*", ptx)
    registers = int(re.findall(r"Used (\d+) registers", said)[-1])
    shared = compiled.metadata.shared
    limits = programs(CHIPS[sm], registers, warps, shared, compiled.metadata.tmem_size or 0)
    # PTX is a rough substitute: ptxas has not optimized it yet.
    text, dialect = ptx, PTX
    if _DISASSEMBLER.exists():
        text, dialect = _run_tool("nvdisasm", "-c", content=compiled.asm["cubin"]).stdout, SASS
    record = {
        "sm": sm,
        "counted_in": dialect.name,
        "registers": registers,
        "spilled": int(re.findall(r"(\d+) bytes spill stores", said)[-1]),
        "shared": shared,
        "programs": min(limits.values()),
        "limited_by": min(limits, key=lambda name: limits[name]),
        "vector_loads": sum(".v4.b32" in load for load in loads),
        "other_loads": sum(".v4.b32" not in load for load in loads),
        "matrix_products": len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
    }
    return record, read_loops(text, dialect, warps)


# attention ------------------------------------------------------------------------------------


def products(name: str, clip: bool) -> list[int]:
    """Matrix products of a tile in each sweep of a kernel, all tiles alive."""
    return {"forward": [1, 3] if clip else [2], "query": [3], "key_value": [4]}[name]


def regular_loops(loops: list[Loop], sweeps: int) -> list[Loop]:
    """The loop of each sweep over tiles that no mask touches; with documents a mask touches all.

    The compiler turns masked loops of one pass into straight code.
    """
    inner = innermost(loops)
    if len(inner) == sweeps:
        return inner
    assert len(inner) == 2 * sweeps, f"{len(inner)} loops of {sweeps} sweeps"
    pairs = zip(inner[::2], inner[1::2], strict=True)
    return [min(pair, key=lambda loop: loop.instructions) for pair in pairs]


def attention_record(name: str, label: str, width: int, blocks: Blocks, sm: int) -> dict[str, Any]:
    """Counts and clocks of one kernel in one form, in bf16."""
    form, columns = FORMS[label], 1 << (width - 1).bit_length()
    constants: dict[str, Any] = {
        "GROUPS": 1,
        "CAP": form.cap,
        "CLIP": form.clip,
        "DOCUMENTS": form.documents,
        "FAST_TANH": form.fast,
        **{"D": width, "COLS": columns, "M": blocks.M, "N": blocks.N},
        **({} if form.documents else {"documents": None}),
        **({} if form.cap else {"tanh_terms": None}),
    }
    if name == "forward":
        constants |= {"STATIC_MAX": form.cap, "UNBIASED": False, "STATS": form.statistics}
        constants |= {} if form.clip else {"w": None}
    launch = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    record, loops = compile_kernel(KERNELS[name], constants, launch, {}, sm)
    counts = products(name, form.clip)
    flops = sum(counts) * 2 * blocks.M * blocks.N * columns
    regular = regular_loops(loops, len(counts))
    found = [loop.flops for loop in regular]
    record |= {
        "kernel": name,
        "form": label,
        "width": width,
        "tile": f"{blocks.M}x{blocks.N}, {blocks.num_warps}, {blocks.num_stages}",
        "scores": blocks.M * blocks.N,
        # Where an instruction tells its shape, the FLOP; elsewhere one instruction a product.
        "on_tensor_cores": all(loop.products >= n for loop, n in zip(regular, counts, strict=True))
        and (None in found or sum(f or 0 for f in found) >= flops),
    }
    # K and V, or Q and dO with log Z and delta, each time.
    rows = blocks.M if name == "key_value" else blocks.N
    loaded = len(counts) * rows * (2 * 2 * columns + (8 if name == "key_value" else 0))
    loaded -= rows * 2 * columns if len(counts) == 2 else 0  # the first sweep of a clip reads no V
    spent = clocks(regular, CHIPS[sm], blocks.num_warps, flops, loaded)
    return record | _counts(regular) | _clocks(spent, record["programs"])


def _counts(loops: list[Loop]) -> dict[str, int]:
    keys = ("instructions", "special", "fp32", "local", "in_flight")
    return {key: sum(getattr(loop, key) for loop in loops) for key in keys}


def _clocks(spent: Clocks, count: int) -> dict[str, float]:
    overlapped = spent.overlapped(max(count, 1))
    return {
        **{f"{key}_clocks": value for key, value in asdict(spent).items()},
        "serial_clocks": spent.serial,
        "overlapped_clocks": overlapped,
        "share_serial": spent.tensor / spent.serial,
        "share_overlapped": spent.tensor / overlapped,
    }


def attention(width: int, forms: tuple[str, ...], sm: int) -> Iterator[dict[str, Any]]:
    """All kernels of one head width, with the tiles of the table."""
    for name in KERNELS:
        for label in forms:
            if name == "forward" or label not in BACKWARD_OF:
                clip = FORMS[label].clip
                blocks = choose_blocks(name, width, clip, torch.bfloat16, torch.device("cpu"))
                yield attention_record(name, label, width, blocks, sm)


def steps(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Forward and backward together: share of the peak by the seven products that are counted.

    Two more are computed, since both kernels of the backward recompute scores and dP.
    """
    found = {(record["sm"], record["kernel"], record["form"]): record for record in records}
    for sm, label in dict.fromkeys((record["sm"], record["form"]) for record in records):
        forward = found[sm, "forward", label]
        form = BACKWARD_OF.get(label, label)
        kernels = [forward, *(found.get((sm, name, form)) for name in ("query", "key_value"))]
        if None in kernels:
            continue
        width = 1 << (forward["width"] - 1).bit_length()
        best = 7 * 2 * width / CHIPS[sm].tensor
        step: dict[str, Any] = {"sm": sm, "form": label}
        for model in ("serial", "overlapped"):
            spent = sum(kernel[f"{model}_clocks"] / kernel["scores"] for kernel in kernels)
            step |= {f"{model}_clocks_of_1000_scores": 1000 * spent}
            step |= {f"share_{model}": best / spent}
        yield step


# head and loss --------------------------------------------------------------------------------


def head_rows(vocab: int, sm: int) -> Iterator[dict[str, Any]]:
    """The head's row kernel: what trains on a GPU in all its forms, and the largest of the rest.

    It has no products; its peak is that of the memory, by two reads and one write of the logits.
    """
    # Imported here: it takes Transformers, which attention need not wait for.
    from hf_stable.kernels import linear_cross_entropy as head  # noqa: PLC0415

    forms = [("bf16", True, True), ("bf16", False, True), ("bf16", True, False)]
    forms += [("fp16", True, True), ("fp32", True, True)]
    for dtype, capped, gradient in forms:
        size = 4 if dtype == "fp32" else 2
        shape = head.block_shape(vocab, vocab, size)
        warps = shape.pop("num_warps")
        constants = {"CAPPED": capped, "GRADIENT": gradient, **shape}
        types = {"p_logits": f"*{dtype}"}
        kernel = head.cross_entropy_rows_kernel
        record, loops = compile_kernel(kernel, constants, {"num_warps": warps}, types, sm)
        record |= {"kernel": "rows", "form": f"{dtype}{', cap' * capped}{', gradient' * gradient}"}
        sums = [loop for loop in loops if loop.special and loop.bytes_read]
        spent = {"issue": 0.0, "special": 0.0}
        for loop in sums:
            logits = loop.bytes_read * 32 * warps / size
            one = clocks([loop], CHIPS[sm], warps, 0)
            spent["issue"] += 1000 * one.issue / logits
            spent["special"] += 1000 * one.special / logits
        memory = 1000 * size * (3 if gradient else 1) / CHIPS[sm].memory
        record |= {"vocab": vocab, **_counts(sums)}
        record |= {f"{key}_clocks": value for key, value in {**spent, "memory": memory}.items()}
        yield record | {"share_overlapped": memory / max(memory, *spent.values())}


# tables and command line -------------------------------------------------------------------

_COLUMNS = {
    "kernel": "kernel",
    "form": "form",
    "tile": "tile, warps, stages",
    "vocab": "vocabulary",
    "instructions": "instr",
    "special": "MUFU",
    "fp32": "FFMA+FMUL",
    "local": "local",
    "in_flight": "in flight",
    "registers": "regs",
    "spilled": "spilled",
    "shared": "shared",
    "programs": "CTAs",
    "tensor_clocks": "tensor clk",
    "issue_clocks": "issue clk",
    "special_clocks": "MUFU clk",
    "loads_clocks": "loads clk",
    "memory_clocks": "memory clk",
    "serial_clocks_of_1000_scores": "serial clk / 1000 scores",
    "overlapped_clocks_of_1000_scores": "overlapped",
    "share_serial": "% serial",
    "share_overlapped": "% overlapped",
}


def _cell(key: str, value: Any) -> str:
    if key.startswith("share_"):
        return f"{100 * value:.0f}"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def table(title: str, records: list[dict[str, Any]]) -> str:
    """A Markdown table of the records, with the columns that any of them has."""
    keys = [key for key in _COLUMNS if any(key in record for record in records)]
    lines = [f"\n{title}\n", "| " + " | ".join(_COLUMNS[key] for key in keys) + " |"]
    lines.append("|" + "---|" * len(keys))
    for record in records:
        cells = [_cell(key, record[key]) if key in record else "" for key in keys]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    kinds = ("attention", "head")
    options.add_argument("--kernels", choices=kinds, help="only these; default: both")
    options.add_argument("--capability", type=int, nargs="+", choices=CHIPS, default=[*CHIPS])
    options.add_argument("--width", type=int, nargs="+", default=[64], help="head widths")
    options.add_argument("--forms", choices=("branches", "all"), default="all")
    options.add_argument("--vocab", type=int, nargs="+", default=[256000], help="vocabularies")
    options.add_argument("--json", type=Path, help="file for all numbers")
    return options.parse_args()


def main() -> int:
    arguments = parse()
    forms = tuple(FORMS) if arguments.forms == "all" else BRANCHES
    records: list[dict[str, Any]] = []
    totals: list[dict[str, Any]] = []
    for sm in arguments.capability:
        for width in arguments.width if arguments.kernels != "head" else ():
            found = list(attention(width, forms, sm))
            both = list(steps(found))
            counted = found[0]["counted_in"]
            title = f"attention, head width {width}, sm_{sm}, counted in {counted}"
            print(table(title, found), flush=True)
            print(table(f"forward and backward, head width {width}, sm_{sm}", both), flush=True)
            records += found
            totals += [{"width": width, **step} for step in both]
        if arguments.kernels != "attention":
            found = [record for vocab in arguments.vocab for record in head_rows(vocab, sm)]
            title = f"head and loss, clocks of 1000 logits, sm_{sm}"
            print(table(title, found), flush=True)
            records += found
    failures = [problem for record in records for problem in problems(record)]
    if arguments.json:
        packages = {**versions(), "triton": triton.__version__}
        content = {"versions": packages, "git_revision": git_revision(), "records": records}
        write_json(arguments.json, {**content, "steps": totals, "failures": failures})
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
