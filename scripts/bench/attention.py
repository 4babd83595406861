"""Attention at B=8, H=16, S=4096, D=64, causal, bf16: our kernels against every peer that is there.

    python scripts/bench/attention.py --output FOLDER              # errors, times, goals
    python scripts/bench/attention.py --output FOLDER --scaling    # lengths and head widths too
    python scripts/bench/attention.py --output FOLDER --tune --seconds 1500    # tiles only

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
    ATT,
    CHECK,
    CLIP,
    DRY,
    EXACT_BAR,
    FAST_BAR,
    OWN,
    PEERS,
    Attention,
    Case,
    Shape,
    eager,
    inputs,
)
from attention_tune import tune
from common import Device, Goal, Run, Times, parse, parser, ratio, relative_error, rows_of, worst
from report import Part, Report

FP32_FLOOR = 1e-5  # beneath it errors are the order of sums, not a mistake
LIVE_TILE = 128

# Cap on / off, restated from 1.20: by static.py the exact tanh adds 9 instructions a score to the
# 10 of the forward, 15 to the 9 of dQ, 16 to the 13 of dK and dV, and a special function to each.
# On sm_90 1000 scores of all three take 524 clocks without a cap and 840 with it one after
# another, and 331 and 558 at best: 1.6 to 1.7. With the hardware's tanh 660 and 379: 1.15 to 1.26.
GOALS = [
    Goal("A1", "cap, fwd+bwd / FlexAttention tanh.approx", 1.00, 0.80),
    Goal("A2", "cap, fwd+bwd / FlexAttention torch.tanh", 0.85, 0.65),
    Goal("A3", "cap, fwd+bwd / SDPA flash without cap", 1.15, 0.90),
    Goal("A4", "cap, fwd+bwd / SDPA cuDNN without cap", 1.70, 1.35),
    Goal("A5", "cap, fwd+bwd / FA4 with cap", 1.40, 1.20),
    Goal("A6", "cap on / off, fwd+bwd", 1.70, 1.50),
    Goal("A6 fast tanh", "cap by fast tanh on / off, fwd+bwd", 1.30, 1.15),
    Goal("A7", "error / the eager formula's own, worst of output and gradients", EXACT_BAR),
    Goal("A7 fast tanh", "the same with fast tanh", FAST_BAR),
    Goal("A7 memory", "kept for the backward / q, k, v, o and log Z", 1.001),
    Goal("C1", "clip, all keys active, fwd+bwd / plain", 2.0, 1.5),
    Goal("C2", "clip (-0.03, 1.03), local attention, fwd+bwd / plain", 1.3, 1.0),
    Goal("C3", "eager clip / clip, fwd+bwd", 8.0, 15.0, at_least=True),
    Goal("C3 memory", "(peak of clip - of plain) / one output tensor, fwd+bwd", 1.05),
    Goal("statistics", "statistics on / off, without cap, fwd+bwd", 1.03),
    Goal("statistics, cap", "statistics on / off, with cap, fwd+bwd", 1.03),
]


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
    part = f"errors at {bench.shape.length} tokens"
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
    bench: Bench, cases: dict[str, Case], part: str, backward: bool
) -> tuple[list[dict[str, Any]], Times]:
    """Times of all cases interleaved, with TFLOP/s, peak memory and errors."""
    device, shape = bench.device, bench.shape
    builders = {name: partial(bench.run, case, backward) for name, case in cases.items()}
    ready, times, skipped = device.measure(builders, seconds=15)
    times = {name: [bench.scale(cases[name]) * ms for ms in times[name]] for name in times}
    rows = rows_of(times, skipped, part, "ours, cap")
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


def compare(bench: Bench, cases: dict[str, Case]) -> Part:
    """The comparison that most goals are of."""
    rows, times = measure(bench, cases, "forward and backward", backward=True)
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


def main() -> int:
    options = parser((__doc__ or "").split("\n\n")[0])
    options.add_argument("--scaling", action="store_true", help="other lengths and widths too")
    options.add_argument("--tune", action="store_true", help="only tiles of our kernels; slow")
    arguments = parse(options)
    device = Device(arguments)
    shape, cases = DRY if device.dry else ATT, {**OWN, **PEERS}
    if arguments.tune:
        report = Report("attention_tiles", [], device, arguments.output)
        tune(Bench(shape, device), report)
        return report.finish()
    report = Report("attention", GOALS, device, arguments.output)
    report.part("errors", lambda: check(Bench(DRY if device.dry else CHECK, device)))
    if arguments.check:
        return report.finish()
    bench = Bench(shape, device)
    report.part("forward and backward", lambda: compare(bench, cases))
    report.part("forward", lambda: (measure(bench, cases, "forward", backward=False)[0], {}))
    some = {name: cases[name] for name in ("ours", "ours, cap", "sdpa flash")}
    for name, other in scaling(shape).items() if arguments.scaling else ():
        report.part(name, lambda n=name, o=other: (measure(Bench(o, device), some, n, True)[0], {}))
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
