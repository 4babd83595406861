"""Head and loss at width 1024, vocabulary 256,000, z-loss 1e-4, bf16: ours against every peer.

A call makes the loss and the gradients of hidden states and head. The floor is the three bare GEMMs
of the same shapes. Extra memory is what a call holds at its peak beyond hidden states, head and the
gradients of both. Errors are against the plain formula in float64; the reference for the head's
gradient is the plain formula in bf16, which sums its chunks in fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Device, Part, Run, Times, ratio, relative_error, rows_of
from goals import HEAD_BAR
from linear_cross_entropy_cases import CASES, Loss, eager, formula

HIDDEN_BAR = 2.0  # times the error of the plain formula in the same dtype
FP32_FLOOR = 1e-5  # beneath it errors are the order of sums, not a mistake
LENGTHS = {"8k": 8192, "32k": 32768}
# Compared within each round, most valuable first; ratios in the rows are over the bare GEMMs.
COMPARISONS = {
    "floor": ("ours", "ours, without z-loss", "ours, cap", "unchunked, compiled"),
    "liger": ("ours", "liger", *(f"liger, chunk {n}" for n in (4, 16, 64))),
    "peers": (
        *("ours", "ours again", "eager", "torch, without z-loss", "cce, without z-loss"),
        *("quack, without z-loss", "fla, without z-loss", "liger, chunk 16, fp32 sums"),
    ),
    "streams": ("ours", "ours, two streams"),
    "chunks": ("ours", "ours, 0.5 GiB", "ours, 1 GiB", "ours, 4 GiB", "unchunked", "eager, cap"),
}


@dataclass(frozen=True)
class Shape:
    tokens: int
    width: int
    vocab: int


MODEL = Shape(8192, 1024, 256_000)
DRY = Shape(4, 16, 96)
CHECK_TOKENS = 2048
CHECKED = ("ours", "ours, without z-loss", "ours, cap", "ours, two streams")


class Bench:
    """The inputs of one shape, and what is measured on them."""

    def __init__(self, shape: Shape, device: Device) -> None:
        self.shape, self.device = shape, device
        self._truths: dict[str, tuple[list[torch.Tensor], dict[str, float]]] = {}
        options = {"device": device.torch, "dtype": device.dtype}
        self.head = torch.randn(shape.vocab, shape.width, **options).mul_(0.02).requires_grad_()
        self.sets = [
            (
                torch.randn(shape.tokens, shape.width, **options).requires_grad_(),
                self._labels(),
            )
            for _ in range(2)
        ]

    def _labels(self) -> torch.Tensor:
        """Few frequent and many rare ids, as in text."""
        share = torch.rand(self.shape.tokens, device=self.device.torch) ** 4
        return (share * self.shape.vocab).long()

    def run(self, make: Callable[[], Loss]) -> Run:
        """One call: the loss and both gradients."""
        loss = make()

        def call(number: int) -> list[torch.Tensor]:
            hidden, labels = self.sets[number % 2]
            value = loss(hidden, self.head, labels)
            return [value.detach(), *torch.autograd.grad(value, (hidden, self.head))]

        return call

    def gemms(self) -> Run:
        """The floor: logits, and from a buffer of their size both gradients."""
        tokens, vocab = self.shape.tokens, self.shape.vocab
        head = self.head.detach()
        logits = torch.empty(tokens, vocab, device=head.device, dtype=head.dtype)
        grad_hidden, grad_head = torch.empty_like(self.sets[0][0]), torch.empty_like(head)

        def call(number: int) -> None:
            hidden = self.sets[number % 2][0].detach()
            torch.matmul(hidden, head.T, out=logits)
            torch.matmul(logits, head, out=grad_hidden.detach())
            torch.matmul(logits.T, hidden, out=grad_head)

        return call

    def extra_gb(self, run: Run) -> float | None:
        """Peak memory of a call beyond its inputs and its two gradients, in GB."""
        peak = self.device.peak_bytes(partial(run, 0))
        returned = self.head.nbytes + self.sets[0][0].nbytes
        return None if peak is None else (peak - returned) / 1e9

    def truth(self, name: str) -> tuple[list[torch.Tensor], dict[str, float]]:
        """Return the float64 reference of a case, and the errors of the plain formula."""
        settings = formula(name)
        key = str(settings)
        if key not in self._truths:
            loss, (hidden, labels) = eager(**settings), self.sets[0]
            wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, self.head)]
            value = loss(*wide, labels)
            exact = [value.detach(), *torch.autograd.grad(value, wide)]
            self._truths[key] = (exact, errors(self.run(lambda: loss)(0), exact))
        return self._truths[key]

    def errors(self, name: str, results: list[torch.Tensor]) -> dict[str, Any]:
        """Errors of a case, and for ours `wrong` where one has missed its bound."""
        exact, own = self.truth(name)
        row: dict[str, Any] = errors(results, exact)
        row["head_over_fp32_sums"] = row["error_head"] / own["error_head"]
        bars = {"error_loss": HIDDEN_BAR, "error_hidden": HIDDEN_BAR, "error_head": HEAD_BAR}
        for key, bar in bars.items():
            if name.startswith("ours") and not row[key] <= max(bar * own[key], FP32_FLOOR):
                row["wrong"] = f"{key} {row[key]:.2g}, the plain formula's {own[key]:.2g}"
        return row


def errors(results: list[torch.Tensor], exact: list[torch.Tensor]) -> dict[str, float]:
    """Relative errors of the loss and of the gradients of hidden states and head."""
    names = ("error_loss", "error_hidden", "error_head")
    return dict(zip(names, map(relative_error, results, exact), strict=True))


def check(bench: Bench) -> Part:
    """Errors of our cases at the full vocabulary; a fast proof before anything is timed."""
    part = f"head and loss, errors at {bench.shape.tokens} tokens"
    builders = {name: partial(bench.run, CASES[name]) for name in CHECKED}
    ready, skipped = bench.device.prepare(builders, warm_ups=1)
    rows: list[dict[str, Any]] = []
    for name, run in ready.items():
        rows.append({"part": part, "case": name, **bench.errors(name, run(0))})
    over = [row["head_over_fp32_sums"] for row in rows]
    return rows + rows_of({}, skipped, part, "ours"), {"L6": max(over, default=None)}


def compare(bench: Bench, tokens: str, name: str) -> Part:
    """One of COMPARISONS at one number of tokens, beside the bare GEMMs."""
    device = bench.device
    # The floor first: its buffer then counts when it is found out who fits.
    builders = {
        "gemms": bench.gemms,
        **{k: partial(bench.run, CASES[k]) for k in COMPARISONS[name]},
    }
    ready, times, skipped = device.measure(builders, seconds=6, warm_ups=2)
    rows = rows_of(times, skipped, f"head and loss, {name}, {tokens} tokens", "gemms")
    for row in rows:
        if "ms" in row and row["case"] != "gemms":
            row["extra_gb"] = bench.extra_gb(ready[row["case"]])
            row.update(bench.errors(row["case"], ready[row["case"]](0)))
    extra = {row["case"]: row.get("extra_gb") for row in rows}
    return rows, goal_values(times, extra, tokens)


def goal_values(
    times: Times, extra: dict[str, float | None], tokens: str
) -> dict[str, float | None]:
    """Values of the goals at one number of tokens from what was measured."""
    over = partial(ratio, times, "ours")
    ligers = [over(name) for name in times if name.startswith("liger") and "sums" not in name]
    values = {
        "L1": over("gemms"),
        "L2": extra.get("ours"),
        "L3 default": over("liger"),
        "L3 best": max((value for value in ligers if value is not None), default=None),
        "L4": over("unchunked, compiled"),
        "L5 z-loss": over("ours, without z-loss"),
        "L5 cap": ratio(times, "ours, cap", "ours"),
    }
    return {f"{name} {tokens}": value for name, value in values.items()}


def vocabulary(shape: Shape, device: Device) -> Part:
    """The same tokens at half the vocabulary."""
    halved = Shape(shape.tokens, shape.width, shape.vocab // 2)
    benches = {f"ours, vocabulary {s.vocab}": Bench(s, device) for s in (halved, shape)}
    builders = {name: partial(bench.run, CASES["ours"]) for name, bench in benches.items()}
    ready, times, skipped = device.measure(builders, seconds=5)
    small, large = benches
    rows = rows_of(times, skipped, "head and loss, vocabulary", small)
    beyond: dict[str, float] = {}
    for row in rows:
        name = row["case"]
        row["extra_gb"] = extra = benches[name].extra_gb(ready[name]) if name in ready else None
        if extra is not None:
            beyond[name] = extra - 4 * benches[name].head.numel() / 1e9
    memory = beyond[large] / beyond[small] if len(beyond) == 2 else None
    return rows, {"G1 CE time": ratio(times, large, small), "G1 CE memory": memory}
