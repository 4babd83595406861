"""The loops of a compiled kernel, and how many clocks of a multiprocessor one pass takes at least.

A multiprocessor has four schedulers. A kernel of W warps gives each of them W / 4, so that one pass
of the loop takes

    issue    W / 4 times the instructions of a warp (on sm_80 at least twice its fp32 ones),
    MUFU     W / 4 * 8 times the special functions (ex2, rcp, tanh: 16 lanes a clock, on all chips),
    tensor   the FLOP of its matrix products / those of a clock,
    loads    the bytes it reads / what the L2 cache gives each multiprocessor in a clock.

The serial model: products wait for the softmax before them and the softmax for products, so that a
pass takes tensor + max(issue, MUFU). With C programs on a multiprocessor one computes its softmax
while another uses the tensor cores, so that the best possible is max(tensor, issue, MUFU, loads,
serial / C). The truth lies between. Products that the code starts before a softmax and waits for
after it ("in flight" in the table) are no faster by this model. Latencies, barriers, device memory,
tiles on the diagonal and clocks that drop under load are left out: both numbers are bounds to
compare kernels by, not times.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

# Bytes that a thread may keep in memory for want of registers: in the regular loop, where every
# tile pays for it, and where only other code does so.
MAX_SPILLED = 64
MAX_SPILLED_OUTSIDE = 128


@dataclass(frozen=True)
class Chip:
    """Rates and sizes of a multiprocessor, by NVIDIA's data sheets and the CUDA programming guide.

    Attributes:
        tensor: dense bf16 FLOP a clock.
        fp32: clocks of one scheduler for an fp32 instruction of a warp.
        cache: bytes a clock out of the L2: 5,120 for all, as of the A100 (of the others NVIDIA says
            nothing), divided by 108, 132 and 148 multiprocessors.
        memory: bytes of device memory a clock, of A100 (2.0 TB/s), H200 (4.8) and B200 (8.0).
        shared: bytes of shared memory; every program takes KIB more than it asks for.
    """

    tensor: int
    fp32: int
    cache: float
    memory: float
    shared: int


KIB = 1024
# By compute capability times ten.
CHIPS = {
    80: Chip(2048, 2, 47.4, 13.4, 164 * KIB),
    90: Chip(4096, 1, 38.8, 19.9, 228 * KIB),
    100: Chip(8192, 1, 34.6, 29.2, 228 * KIB),
}
_REGISTERS, _WARPS, _TENSOR_COLUMNS = 65536, 64, 512


def programs(
    chip: Chip, registers: int, warps: int, shared: int, tensor_columns: int
) -> dict[str, int]:
    """Programs that fit one multiprocessor, by what limits them."""
    each = math.ceil(registers / 8) * 8 * 32 * warps
    limits = {
        "registers": _REGISTERS // each,
        "shared memory": chip.shared // (shared + KIB),
        "warps": _WARPS // warps,
    }
    if tensor_columns:
        limits["tensor memory"] = _TENSOR_COLUMNS // tensor_columns
    return limits


@dataclass(frozen=True)
class Dialect:
    """Patterns of the counted instructions in an assembly language; they match line starts."""

    name: str
    label: str
    branch: str
    special: str
    fp32: str
    local: str
    load: str
    product: str


_PREDICATE = r"(?:@!?%?[UuPp]\w+\s+)?"
SASS = Dialect(
    name="SASS",
    label=r"(\.L_x_\d+):",
    branch=_PREDICATE + r"BRA\S*\s.*?`\((\.L_x_\d+)\)",
    special=_PREDICATE + r"MUFU",
    fp32=_PREDICATE + r"F(?:FMA|MUL)",
    local=_PREDICATE + r"(?:LDL|STL)",
    load=_PREDICATE + r"LDG\.E\.?(\S*)",
    product=_PREDICATE + r"(?:HGMMA\.64x(\d+)x16|HMMA\.16816|UTC\w*MMA)",
)
PTX = Dialect(
    name="PTX",
    label=r"(\$L__BB\w+):",
    branch=_PREDICATE + r"bra\S*\s+(\$L__BB\w+);",
    special=_PREDICATE + r"(?:ex2|lg2|rcp|sqrt|rsqrt|tanh)\.approx",
    fp32=_PREDICATE + r"(?:fma\.rn|mul)\.\S*f32",
    local=_PREDICATE + r"(?:ld|st)\.local",
    load=_PREDICATE + r"ld\.global(\S*)\s",
    product=_PREDICATE + r"(?:wgmma\.mma_async\S*m64n(\d+)k16|mma\.sync\S*m16n8k16|tcgen05\.mma)",
)


@dataclass(frozen=True)
class Loop:
    """Largest counts of one warp in one pass of a loop."""

    lines: range
    """Lines of the assembly."""
    instructions: int
    special: int
    fp32: int
    local: int
    products: int
    """Matrix instructions."""
    flops: int | None
    """FLOPs of the products over all warps; None where an instruction does not state its shape."""
    bytes_read: int
    """Bytes that one thread reads from global memory."""
    in_flight: int
    """Instructions between a product of sm_90 and the wait for it."""


def read_loops(text: str, dialect: Dialect, warps: int) -> list[Loop]:
    """Return the loops of a kernel in the order of their code."""
    lines = [re.sub(r"^\s*/\*\w+\*/\s*", "", line).strip() for line in text.splitlines()]
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for index, line in enumerate(lines):
        if found := re.match(dialect.label, line):
            labels[found[1]] = index
        elif (found := re.match(dialect.branch, line)) and found[1] in labels:
            ends[labels[found[1]]] = index
    spans = [range(start, end) for start, end in sorted(ends.items())]
    # Where ptxas moved code out of a loop to the end of the kernel, that code jumps back into it.
    whole = [
        span
        for span in spans
        if not any(other.start < span.start < other.stop < span.stop for other in spans)
    ]
    return [_loop(lines, span, dialect, warps) for span in whole]


def innermost(loops: list[Loop]) -> list[Loop]:
    """Return the loops with matrix products that contain no other such loop."""
    found = [loop for loop in loops if loop.products]

    def contains(outer: Loop, inner: Loop) -> bool:
        return outer is not inner and inner.lines.start in outer.lines

    return [loop for loop in found if not any(contains(loop, other) for other in found)]


def _loop(lines: list[str], span: range, dialect: Dialect, warps: int) -> Loop:
    code = [line for line in lines[span.start : span.stop + 1] if re.match(r"[@{\w].*;$", line)]

    def matches(pattern: str) -> list[re.Match[str]]:
        return [found for line in code if (found := re.match(pattern, line))]

    products = matches(dialect.product)
    flops = [_flops(found, warps) for found in products]
    return Loop(
        lines=span,
        instructions=len(code),
        special=len(matches(dialect.special)),
        fp32=len(matches(dialect.fp32)),
        local=len(matches(dialect.local)),
        products=len(products),
        flops=None if None in flops else sum(number or 0 for number in flops),
        bytes_read=sum(_bytes(found[1]) for found in matches(dialect.load)),
        in_flight=_in_flight(code),
    )


def _in_flight(code: list[str]) -> int:
    """Instructions that run beside a product; one may be in flight from pass to pass."""
    count, running = 0, False
    for index, line in enumerate(code * 2):
        count += running and index >= len(code) and "HGMMA" not in line
        running = "HGMMA" in line or (running and "WARPGROUP.DEPBAR" not in line)
    return count


def _flops(product: re.Match[str], warps: int) -> int | None:
    """FLOP of one matrix instruction over all warps, four of which share a wgmma."""
    if product[1]:
        return 2 * 64 * int(product[1]) * 16 * (warps // 4)
    if "UTC" in product[0] or "tcgen05" in product[0]:
        return None
    return 2 * 16 * 8 * 16 * warps


def _bytes(kind: str) -> int:
    """Bytes that a thread loads by an instruction with these modifiers."""
    words = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    words |= {"b8": 1, "b16": 2, "u16": 2, "b64": 8, "u64": 8}
    parts = kind.split(".")
    vector = next((int(part[1]) for part in parts if part in ("v2", "v4")), 1)
    return vector * next((words[part] for part in parts if part in words), 4)


@dataclass(frozen=True)
class Clocks:
    """Clocks of one multiprocessor for one pass of all loops given, by what they are spent on."""

    tensor: float
    issue: float
    special: float
    loads: float = 0.0

    @property
    def serial(self) -> float:
        return self.tensor + max(self.issue, self.special)

    def overlapped(self, count: int) -> float:
        """At best, with `count` programs on the multiprocessor."""
        return max(self.tensor, self.issue, self.special, self.loads, self.serial / count)


def clocks(loops: list[Loop], chip: Chip, warps: int, flops: int, loaded: int = 0) -> Clocks:
    """Model of this file, for loops whose products are `flops`, and loads bytes, together."""
    share = warps / 4
    issue = sum(max(loop.instructions, chip.fp32 * loop.fp32) for loop in loops)
    special = sum(loop.special for loop in loops)
    return Clocks(flops / chip.tensor, share * issue, share * 8 * special, loaded / chip.cache)


def problems(record: dict[str, Any]) -> list[str]:
    """Return what is wrong with a kernel, each with the number found."""
    found = []
    allowed = MAX_SPILLED if record["local"] else MAX_SPILLED_OUTSIDE
    if record["spilled"] > allowed:
        where = "in its loop" if record["local"] else "outside its loop"
        found.append(f"spills {record['spilled']} bytes {where}, {allowed} are allowed")
    if record["programs"] < 1:
        found.append(f"does not fit a multiprocessor: {record['limited_by']}")
    if not record.get("on_tensor_cores", True):
        found.append("has matrix products that are not on tensor cores")
    place = f"sm_{record['sm']}, {record['kernel']} ({record['form']}), {record.get('tile', '')}"
    return [f"{place}: {problem}" for problem in found]
