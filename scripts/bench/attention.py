"""Attention at B=8, H=16, S=4096, D=64, causal, bf16: our kernels against every peer that is there.

TFLOP/s count the causal half of 4 S^2 D a head forward, and 3.5 times that with the backward pass.
Errors are of the timed call's first two heads against the eager formula in float64; beside them is
the error of the eager formula in the timed dtype. Eager attention runs on a part of the batch that
fits, and its time and memory are scaled to the whole.
"""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from attention_cases import (
    CLIP,
    OWN,
    PEERS,
    Attention,
    Case,
    Shape,
    eager,
    inputs,
)
from common import Device, Part, Run, Times, ratio, relative_error, rows_of, worst
from goals import EXACT_BAR, FAST_BAR

FP32_FLOOR = 1e-5  # beneath it errors are the order of sums, not a mistake
LIVE_TILE = 128
# Compared within each round, most valuable first; ratios in the rows are over the first case.
COMPARISONS = {
    "cap beside SDPA": (
        *("ours, cap", "ours", "ours again", "ours, cap, fast tanh"),
        *("sdpa flash", "sdpa cudnn"),
    ),
    "cap beside FlexAttention": (
        *("ours, cap", "flex, cap, approximate tanh", "flex, cap, exact tanh", "flex"),
    ),
    "statistics": ("ours", "ours, statistics", "ours, cap", "ours, cap, statistics"),
    "clip": ("ours", "ours, clip dense", "ours, local", "ours, clip local"),
    "cap beside FlashAttention": ("ours, cap", "fa2, cap", "fa3, cap", "fa4, cap"),
    "eager": ("ours, clip dense", "eager, clip dense", "eager", "eager, cap"),
    "more clips": ("ours", "ours, cap, clip dense", "ours, clip scattered"),
}
CASES = {**OWN, **PEERS}


def gradients(attention: Attention, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and the gradients of q, k and v."""
    *leaves, grad = tensors
    output = attention(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


class Bench:
    """The inputs of one shape, and what is measured on them."""

    def __init__(self, shape: Shape, device: Device) -> None:
        self.shape, self.device = shape, device
        self.inputs = cache(partial(inputs, shape=shape, device=device))
        self.truth = cache(self._truth)
        # A second instance of a compiled peer would be compiled again.
        self.attention = cache(lambda case: case.make(shape, device))

    def run(self, case: Case, backward: bool) -> Run:
        """One call of the case, forward or forward and backward."""
        attention = self.attention(case)
        sets = [
            [
                tensor[: case.batch].detach().requires_grad_(backward and tensor.requires_grad)
                for tensor in tensors
            ]
            for tensors in self.inputs(case.data)
        ]

        def call(number: int) -> object:
            tensors = sets[number % len(sets)]
            return gradients(attention, tensors) if backward else attention(*tensors[:3])

        return call

    def scale(self, case: Case) -> float:
        """Factor from the part of the batch that a case runs to the whole."""
        return self.shape.batch / min(self.shape.batch, case.batch or self.shape.batch)

    def _truth(
        self, settings: tuple[tuple[str, float], ...], data: str
    ) -> tuple[list[torch.Tensor], list[float]]:
        """Two heads of the first sequence by the eager formula in float64, and its own errors."""
        attention = eager(self.shape, self.device, **dict(settings))
        heads = [tensor[:1, :2].detach() for tensor in self.inputs(data)[0]]
        exact, rounded = (
            gradients(attention, [tensor.to(dtype, copy=True).requires_grad_() for tensor in heads])
            for dtype in (torch.float64, self.device.dtype)
        )
        return exact, [relative_error(*pair) for pair in zip(rounded, exact, strict=True)]

    def errors(self, case: Case, results: list[torch.Tensor]) -> dict[str, Any]:
        """Errors of a case's output and gradients, the worst over the eager formula's own.

        `wrong` stands in the row when one of ours has missed its bound.
        """
        truth, eager_errors = self.truth(case.settings, case.data)
        pairs = zip((result[:1, :2] for result in results), truth, strict=True)
        errors = [relative_error(*pair) for pair in pairs]
        shares = [error / own for error, own in zip(errors, eager_errors, strict=True)]
        names = ("error_out", "error_dq", "error_dk", "error_dv")
        row = {**dict(zip(names, errors, strict=True)), "over_eager": worst(shares)}
        for error, own in zip(errors, eager_errors, strict=True):
            if case.bar is not None and not error <= max(case.bar * own, FP32_FLOOR):
                row["wrong"] = f"relative error {error:.2g}, the eager formula's {own:.2g}"
        return row

    def kept(self, case: Case) -> float:
        """Bytes that autograd keeps for the backward, over those of q, k, v, o and log Z."""
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        leaves = self.inputs(case.data)[0][:3]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = self.attention(case)(*leaves)
        rows = output.numel() // self.shape.width
        return sum(kept.values()) / (4 * output.nbytes + 4 * rows)

    def live_tiles(self, data: str) -> float:
        """Share of the causal tiles in which CLIP leaves a key; the others our kernels skip."""
        q, k = (tensor[0, 0].detach().float() for tensor in self.inputs(data)[0][:2])
        scores = q @ k.T * self.shape.width**-0.5
        causal = torch.ones_like(scores, dtype=torch.bool).tril()
        probs = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        live = probs > -CLIP["clip_gamma"] / (CLIP["clip_zeta"] - CLIP["clip_gamma"])
        tiles, seen = (
            torch.nn.functional.max_pool2d(mask.float()[None], LIVE_TILE, ceil_mode=True)
            for mask in (live, causal)
        )
        return (tiles.sum() / seen.sum()).item()


def check(bench: Bench) -> Part:
    """Errors of all our cases and what they keep; a fast proof before anything is timed."""
    builders = {name: partial(bench.run, case, backward=True) for name, case in OWN.items()}
    ready, skipped = bench.device.prepare(builders, warm_ups=1)
    part = f"attention, errors at {bench.shape.length} tokens"
    rows: list[dict[str, Any]] = []
    for name, run in ready.items():
        rows.append({"part": part, "case": name, **bench.errors(OWN[name], run(0))})
    shares = {bar: [] for bar in (EXACT_BAR, FAST_BAR)}
    for row in rows:
        shares[OWN[row["case"]].bar].append(row["over_eager"])
    kept = [bench.kept(OWN[name]) for name in ready if name in ("ours", "ours, cap")]
    values = {
        "A7": worst(shares[EXACT_BAR]),
        "A7 fast tanh": worst(shares[FAST_BAR]),
        "A7 memory": worst(kept),
    }
    return rows + rows_of({}, skipped, part, "ours"), values


def measure(
    bench: Bench, names: tuple[str, ...], part: str, backward: bool
) -> tuple[list[dict[str, Any]], Times]:
    """Times of these cases interleaved, with TFLOP/s, peak memory and errors."""
    device, shape, cases = bench.device, bench.shape, {name: CASES[name] for name in names}
    builders = {name: partial(bench.run, case, backward) for name, case in cases.items()}
    ready, times, skipped = device.measure(builders, seconds=8)
    times = {name: [bench.scale(cases[name]) * ms for ms in times[name]] for name in times}
    rows = rows_of(times, skipped, part, names[0])
    for row in rows:
        if "ms" not in row:
            continue
        name, case = row["case"], cases[row["case"]]
        row["tflops"] = shape.flops(backward) / row["ms"] / 1e9
        peak = device.peak_bytes(partial(ready[name], 0))
        row["peak_gb"] = None if peak is None else bench.scale(case) * peak / 1e9
        if backward:
            row.update(bench.errors(case, ready[name](0)))
        if case.settings == tuple(CLIP.items()):
            row["live_tiles"] = bench.live_tiles(case.data)
    return rows, times


def compare(bench: Bench, name: str) -> Part:
    """One of COMPARISONS, forward and backward, with the goals that it has the cases for."""
    rows, times = measure(bench, COMPARISONS[name], f"attention, {name}", backward=True)
    peaks = {row["case"]: row.get("peak_gb") for row in rows}
    shape, bytes_each = bench.shape, bench.device.dtype.itemsize
    output_gb = shape.batch * shape.heads * shape.length * shape.width * bytes_each / 1e9
    return rows, goal_values(times, peaks, output_gb)


def goal_values(
    times: Times, peaks: dict[str, float | None], output_gb: float
) -> dict[str, float | None]:
    """Values of the goals on time and peak memory from what was measured of them."""
    capped = partial(ratio, times, "ours, cap")
    plain, clip = peaks.get("ours"), peaks.get("ours, clip dense")
    return {
        "A1": capped("flex, cap, approximate tanh"),
        "A2": capped("flex, cap, exact tanh"),
        "A3": capped("sdpa flash"),
        "A4": capped("sdpa cudnn"),
        "A5": capped("fa4, cap"),
        "A6": capped("ours"),
        "A6 fast tanh": ratio(times, "ours, cap, fast tanh", "ours"),
        "C1": ratio(times, "ours, clip dense", "ours"),
        "C2": ratio(times, "ours, clip local", "ours, local"),
        "C3": ratio(times, "eager, clip dense", "ours, clip dense"),
        "C3 memory": None if plain is None or clip is None else (clip - plain) / output_gb,
        "statistics": ratio(times, "ours, statistics", "ours"),
        "statistics, cap": ratio(times, "ours, cap, statistics", "ours, cap"),
    }


def scaling(shape: Shape) -> dict[str, Shape]:
    """The same number of tokens in other sequences, and of channels in other heads."""
    tokens, channels = shape.batch * shape.length, shape.heads * shape.width
    lengths = [shape.length // 2, 2 * shape.length, 4 * shape.length]
    shapes = {
        f"{length} tokens": replace(shape, batch=max(1, tokens // length), length=length)
        for length in lengths
    }
    for width in (32, 128, 256):
        shapes[f"head width {width}"] = replace(shape, heads=max(1, channels // width), width=width)
    return shapes
