"""Time and memory measurements that the GPU benchmarks share.

Laws: all cases of a comparison live in one process. A round times each of them once, in an order
that changes, so that a clock that drifts hits all alike; a ratio is taken within a round, and the
median over rounds is reported. Inputs rotate and are random, never zero (zeros draw less power and
run faster); a buffer larger than any L2 cache is written between two timings. A peer that is absent
or fails is a row with its reason. `--dry` runs everything on tiny shapes, on a CPU too: that is a
rehearsal, whose numbers mean nothing and are marked so.
"""

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import clocks
import torch
from page import NOT_RUN

# Triton decides at its import, which comes later, whether kernels run on a GPU or are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

Run = Callable[[int], object]
"""One call of what is timed, on the input set of this number."""
Times = dict[str, list[float]]
"""Milliseconds of each round by case."""
Part = tuple[list[dict[str, Any]], dict[str, float | None]]
"""Rows, and values by goal id."""

PEAK_FLOPS = 989e12  # dense bf16 of H100 and H200 by NVIDIA's data sheet, the base of every MFU
ROUNDS, MIN_ROUNDS = 50, 5


def ratio(times: Times, name: str, base: str) -> float | None:
    """Median over rounds of one case's time over another's; None unless both were measured."""
    pairs = list(zip(times.get(name, []), times.get(base, []), strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def worst(values: Iterable[float | None]) -> float | None:
    """The largest of what was measured; NaN if any is."""
    found = [value for value in values if value is not None]
    if any(math.isnan(value) for value in found):
        return math.nan
    return max(found, default=None)


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """|value - truth| / |truth| by the Frobenius norm, in float64; NaN never passes."""
    truth = truth.double()
    return ((value.double() - truth).norm() / truth.norm()).item()


@dataclass(frozen=True)
class Measurement:
    """One case of the plan: what is measured together, saved together, and not repeated.

    Attributes:
        limit: seconds after which it counts as failed and its process is ended.
        sizes: what it is measured on, a part of its identity.
    """

    name: str
    measure: Callable[[], Part]
    limit: float
    sizes: Mapping[str, Any]


class NotRunError(Exception):
    """A case that this machine or the time left does not allow: no failure, whoever's it is."""


def reason(error: Exception) -> str:
    """Why a case was not measured, in one line."""
    if isinstance(error, NotRunError):
        return f"{NOT_RUN}{error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


class Device:
    """The device under test, with its ways to measure.

    Attributes:
        dry: tiny shapes; on a CPU always.
        deadline: of `time.monotonic()`; what was not reached by then is not measured.
        spans: when it timed, by `time.monotonic()`, for the readings of clocks.
    """

    def __init__(self, dry: bool, seconds: float, rounds: int = ROUNDS) -> None:
        self.cuda = torch.cuda.is_available()
        self.dry = dry
        self.torch = torch.device("cuda" if self.cuda else "cpu")
        # The interpreter of Triton cannot do bf16.
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.rounds: int = 1 if self.dry else rounds
        self.deadline = time.monotonic() + seconds
        flush_bytes = 2**28 if self.cuda else 0
        self._flush = torch.empty(flush_bytes, dtype=torch.int8, device=self.torch)
        self._order = random.Random(0)
        self.spans: list[tuple[float, float]] = []
        torch.manual_seed(0)
        # Many forms of one function are compiled in a process, each for one shape.
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.accumulated_recompile_limit = 1024

    def require_time(self) -> None:
        """Raise when the deadline has passed."""
        if time.monotonic() > self.deadline:
            raise NotRunError("no time left")

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def start(self, run: Callable[[], object]) -> Callable[[], float]:
        """Start `run`; the returned function waits for its end and says its milliseconds."""
        if not self.cuda:
            begin = time.perf_counter()
            run()
            elapsed = 1e3 * (time.perf_counter() - begin)
            return lambda: elapsed
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()  # the host gets ahead meanwhile, so that launches do not count
        before.record()
        run()
        after.record()

        def read() -> float:
            after.synchronize()
            return before.elapsed_time(after)

        return read

    def prepare(
        self, builders: Mapping[str, Callable[[], Run]], warm_ups: int = 3
    ) -> tuple[dict[str, Run], dict[str, str]]:
        """Build and warm up each case; those that cannot run or come too late, with the reason."""
        ready: dict[str, Run] = {}
        skipped: dict[str, str] = {}
        for name, build in builders.items():
            try:
                self.require_time()
                run = build()
                for number in range(1 if self.dry else warm_ups):
                    run(number)
                self.synchronize()
                ready[name] = run
            except Exception as error:  # a peer may be absent, too large, or broken in its own way
                skipped[name] = reason(error)
            if name in skipped:
                self.free()  # only now, when no traceback holds tensors any more
        return ready, skipped

    def measure(
        self, builders: Mapping[str, Callable[[], Run]], seconds: float, warm_ups: int = 3
    ) -> tuple[dict[str, Run], Times, dict[str, str]]:
        """`prepare` and `interleave`: what ran, its times, and why the rest was skipped."""
        ready, skipped = self.prepare(builders, warm_ups)
        times = self.interleave(ready, seconds)
        skipped.update(dict.fromkeys(ready.keys() - times, "out of memory beside the others"))
        return {name: ready[name] for name in times}, times, skipped

    def interleave(self, cases: Mapping[str, Run], seconds: float) -> Times:
        """Time each case once a round, for about `seconds`, but never fewer than MIN_ROUNDS.

        A case that runs out of memory beside the others is left out.
        """
        names, times = list(cases), {name: list[float]() for name in cases}
        begin = time.monotonic()
        end = min(begin + seconds, self.deadline)
        for number in range(self.rounds):
            if number >= MIN_ROUNDS and time.monotonic() > end:
                break
            self._order.shuffle(names)
            readings: dict[str, Callable[[], float]] = {}
            for name in names:
                try:
                    readings[name] = self.start(partial(cases[name], number))
                except torch.OutOfMemoryError:
                    del times[name]
            names = list(readings)
            for name, read in readings.items():
                times[name].append(read())
        self.spans.append((begin, time.monotonic()))
        return times

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Most memory that `run` holds beyond what is held before; None on a CPU."""
        if not self.cuda:
            return None
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def free(self) -> None:
        """Give back the GPU's memory that no object holds any more."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    @property
    def gemm_size(self) -> int:
        return 64 if self.dry else 8192

    def gemm_tflops(self) -> float:
        """Return the rate of the library's bf16 product of two large random square matrices."""
        size = self.gemm_size
        shape = (3, size, size)
        left, right = (torch.randn(shape, device=self.torch, dtype=self.dtype) for _ in range(2))

        def run(number: int) -> torch.Tensor:
            return left[number % 3] @ right[number % 3]

        for number in range(3 if self.dry else 200):  # an idle GPU takes a while to clock up
            run(number)
        times = self.interleave({"gemm": run}, seconds=1.0)["gemm"]
        return 2 * size**3 / statistics.median(times) / 1e9

    def describe(self) -> dict[str, Any]:
        """Name, clocks, power and temperature as found; nothing is ever set."""
        if not self.cuda:
            return {"name": f"cpu, {torch.get_num_threads()} threads"}
        properties = torch.cuda.get_device_properties(self.torch)
        about = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": properties.total_memory / 1e9,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        return {**about, **clocks.query()}


def rows_of(times: Times, skipped: dict[str, str], part: str, base: str) -> list[dict[str, Any]]:
    """A row for every case: median, quartiles, and the ratio over `base` in the same round."""
    rows: list[dict[str, Any]] = []
    for name, values in times.items():
        ordered = sorted(values)
        rows.append(
            {
                "part": part,
                "case": name,
                "ms": statistics.median(values),
                "ms_quartiles": [ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]],
                "rounds": len(values),
                "over_base": ratio(times, name, base),
                "base": base,
            }
        )
    return rows + [{"part": part, "case": name, "skipped": why} for name, why in skipped.items()]
