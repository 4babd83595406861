"""Compute the named numbers of a step from its sums."""

import math

from .attention import CLIPPED, ENTROPY, LONG_ROWS, ROWS
from .gauges import Reduced, world_size
from .names import Numbers


def attention_numbers(reduced: Reduced, place: str, cap: float | None, clips: bool) -> Numbers:
    """Return the numbers of `hooks.hook_attention` for one layer, one per head."""
    if f"{place}/rows" not in reduced:
        return {}
    found = {**_head_norms(reduced, place), **_gains(reduced, place)}
    largest = reduced[f"{place}/largest"]
    heads = len(largest)
    rows = [reduced[f"{place}/rows"][row * heads : (row + 1) * heads] for row in range(ROWS + 1)]
    if not rows[ROWS][0]:
        return found
    found[f"{place}/max_logit"] = largest
    if cap is not None:
        found[f"{place}/max_logit_capped"] = [cap * math.tanh(logit / cap) for logit in largest]
    if rows[LONG_ROWS][0]:
        found[f"{place}/entropy"] = _ratios(rows[ENTROPY], rows[LONG_ROWS])
    if clips:
        found[f"{place}/clipped_rows"] = _ratios(rows[CLIPPED], rows[ROWS])
    return found


def _head_norms(reduced: Reduced, place: str) -> Numbers:
    found: Numbers = {}
    for name in ("q", "k"):
        for suffix in ("", "_before_norm"):
            sums = reduced.get(f"{place}/{name}{suffix}", [])
            squares, tokens = sums[: len(sums) // 2], sums[len(sums) // 2 :]
            if tokens and tokens[0]:
                norms = [math.sqrt(square) for square in _ratios(squares, tokens)]
                found[f"{place}/{name}_l2{suffix}"] = norms
    return found


def _gains(reduced: Reduced, place: str) -> Numbers:
    return {
        f"{place}/{name}_gain_max": reduced[f"{place}/{name}_gain"][0]
        for name in ("q", "k")
        if f"{place}/{name}_gain" in reduced
    }


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [one / other for one, other in zip(above, below, strict=True)]


def stream_std(sums: list[float]) -> float | None:
    """Return the standard deviation from (sum of squares, count, sum), or None if count is 0."""
    squares, count, total = sums
    if not count:
        return None
    variance = squares / count - (total / count) ** 2
    # Rounding can make the variance of a constant stream negative; NaN must stay NaN.
    return 0.0 if variance < 0 else math.sqrt(variance)


def tensor_numbers(reduced: Reduced, place: str) -> Numbers:
    """Return the norms of the input, its gradient and the output of a module."""
    found: Numbers = {}
    for what in ("input", "output"):
        squares, count = reduced.get(f"{place}/{what}", (0.0, 0.0))
        if count:
            found[f"{place}/{what}_l2"] = math.sqrt(squares)
            found[f"{place}/{what}_rms"] = math.sqrt(squares / count)
    squares, count = reduced.get(f"{place}/input_grad", (0.0, 0.0))
    if count:
        # Gradients are averaged over processes, so each loss is scaled by the number of processes.
        found[f"{place}/input_grad_l2"] = math.sqrt(squares) / world_size()
    return found


def stream_numbers(reduced: Reduced, place: str, names: tuple[str, ...]) -> Numbers:
    """Return standard deviations of the residual stream at the named places."""
    found: Numbers = {}
    for name in names:
        spread = stream_std(reduced.get(f"{place}/{name}", [0.0, 0.0, 0.0]))
        if spread is not None:
            found[f"{place}/{name}_std"] = spread
    return found
