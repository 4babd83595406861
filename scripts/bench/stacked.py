"""Small runs in one process with their parameters stacked, against runs one by one.

    python scripts/bench/stacked.py --output scripts/bench/results/cpu_stacked.json

K runs of a study's model and batch train at K learning rates: one after the other in one process,
in two processes with a thread each (what `hf-stable sweep --workers 2` does), and stacked:
parameters of shape (K, ...), `vmap` over loss and gradients, clipping by each run's norm, and one
fused AdamW over every run's slices. Before any clock starts, stacked losses have to be those of
separate runs.

Every round times each case once, in an order that changes, and a ratio is taken within a round, so
that other work on the machine meets all alike. Beside the time on the clock stand the seconds that
cores worked, as the system counts them: what a machine with all its cores in use pays for a run's
step, and nearly the same on a busy machine. On a GPU only the clock counts; cases share the GPU.
"""

import argparse
import multiprocessing
import os
import random
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from stacked_runs import (
    CHECKED_STEPS,
    FORMS,
    Separate,
    Stacked,
    attention_of,
    check,
    rates_of,
    recipe_of,
)

from hf_stable.records import git_revision, versions, write_json
from hf_stable.sweep.bootstrap import interval, resampled

ONE, TWO = "one process", "two processes"
CLOCKS = ("clock", "cores")
MIN_ROUNDS = 5


def serve(connection: Connection, method: str, threads: int) -> None:
    """A process that holds cases: told (form, runs, first run), it does a step of each, and answers
    with the seconds that its threads worked."""
    torch.set_num_threads(threads)
    recipe, cases = recipe_of(method), dict[Any, Separate | Stacked]()
    while (order := connection.recv()) is not None:
        form, num_runs, first = order
        if order not in cases:
            rates, attention = rates_of(num_runs), attention_of(form)
            cases[order] = FORMS[form](recipe, rates, first, attention, torch.float32)
        start = time.process_time()
        cases[order].step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        connection.send(time.process_time() - start)


Order = tuple[Connection, tuple[str, int, int]]


def seconds(orders: list[Order]) -> tuple[float, float]:
    """By the clock, from the first order to the last answer, and of all processes' cores."""
    start = time.perf_counter()
    for connection, order in orders:
        connection.send(order)
    cores = sum(connection.recv() for connection, _ in orders)
    return time.perf_counter() - start, cores


def cases_of(
    num_runs: int, single: list[Connection], many: Connection | None, threads: int
) -> dict[str, list[Order]]:
    """Orders of each case: one step of all runs.

    Args:
        single: two processes with one thread. many: one with `threads`.
    """
    half = num_runs // 2
    parts = [(single[0], num_runs - half, 0), (single[1], half, num_runs - half)]
    cases: dict[str, list[Order]] = {
        ONE: [(single[0], ("separate", num_runs, 0))],
        "stacked": [(single[0], ("stacked", num_runs, 0))],
    }
    if many is not None:
        cases[f"stacked, {threads} threads"] = [(many, ("stacked", num_runs, 0))]
    if half:
        cases[TWO] = [(where, ("separate", number, first)) for where, number, first in parts]
        cases["stacked in two processes"] = [
            (where, ("stacked", number, first)) for where, number, first in parts
        ]
    return cases


def measure(
    cases: Mapping[tuple[int, str], list[Order]], rounds: int, budget: float
) -> dict[tuple[int, str], np.ndarray]:
    """(rounds, 2) seconds of each case by the clock and of cores, after a round of warm-up; at
    least MIN_ROUNDS, and no new one after `budget` seconds."""
    times: dict[tuple[int, str], list[tuple[float, float]]] = {name: [] for name in cases}
    order, names, end = random.Random(0), list(cases), time.monotonic() + budget
    for number in range(-1, rounds):
        if number >= MIN_ROUNDS and time.monotonic() > end:
            break
        order.shuffle(names)
        for name in names:
            elapsed = seconds(cases[name])
            if number >= 0:
                times[name].append(elapsed)
    return {name: np.array(values) for name, values in times.items()}


def with_interval(values: np.ndarray) -> list[float]:
    """Median with its 95 % bootstrap interval over rounds."""
    found = resampled(lambda index: np.median(values[index], axis=1), len(values))
    return list(interval(float(np.median(values)), found))


def rows_of(times: Mapping[tuple[int, str], np.ndarray]) -> list[dict[str, Any]]:
    """A row for each case: a run's step in milliseconds, and the ratios round by round."""
    rows = []
    for (num_runs, case), values in times.items():
        row: dict[str, Any] = {"runs": num_runs, "case": case, "rounds": len(values)}
        for place, what in enumerate(CLOCKS):
            mine = values[:, place]
            row[f"{what} ms"] = with_interval(1e3 * mine / num_runs)
            row[f"{what} ms quartiles"] = np.quantile(1e3 * mine / num_runs, [0.25, 0.75]).tolist()
            for base in (ONE, TWO):
                if (num_runs, base) in times:
                    row[f"{what} / {base}"] = with_interval(mine / times[num_runs, base][:, place])
        rows.append(row)
    return rows


def table_of(rows: list[dict[str, Any]], what: str) -> Table:
    """What was measured by one of CLOCKS, for the terminal."""

    def words(found: list[float] | None, form: str) -> str:
        if found is None:
            return ""
        return f"{found[0]:{form}} ({found[1]:{form}} to {found[2]:{form}})"

    title = f"a run's step by the {what}; medians with 95 % intervals"
    table = Table("runs", "case", "ms", f"/ {ONE}", f"/ {TWO}", title=title)
    for row in rows:
        ratios = (words(row.get(f"{what} / {base}"), ".2f") for base in (ONE, TWO))
        table.add_row(str(row["runs"]), row["case"], words(row[f"{what} ms"], ".1f"), *ratios)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K")
    parser.add_argument("--method", default="baseline", help="of recipes/sweeps/table3_cpu.yaml")
    parser.add_argument("--threads", type=int, default=1, help="of a further stacked case, above 1")
    parser.add_argument("--rounds", type=int, default=60, help="at most")
    parser.add_argument("--seconds", type=float, default=200, help="start no new round after this")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    recipe, cuda = recipe_of(arguments.method), torch.cuda.is_available()
    differences = check(arguments.method)
    print(f"largest difference of a loss over {CHECKED_STEPS} steps, nats: {differences}")
    context, processes = multiprocessing.get_context("spawn"), []

    def start(threads: int) -> Connection:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, arguments.method, threads))
        process.start()
        theirs.close()
        processes.append((process, ours))
        return ours

    try:
        single = [start(1), start(1)]
        many = start(arguments.threads) if arguments.threads > 1 else None
        cases = {
            (num_runs, case): orders
            for num_runs in arguments.runs
            for case, orders in cases_of(num_runs, single, many, arguments.threads).items()
        }
        times = measure(cases, arguments.rounds, arguments.seconds)
    finally:
        for process, connection in processes:
            connection.send(None)
            process.join()
    rows = rows_of(times)
    for what in CLOCKS:
        Console(width=120).print(table_of(rows, what))
    if arguments.output:
        shape = [recipe.training.micro_batch_size, recipe.data.sequence_length]
        write_json(
            arguments.output,
            {
                "device": torch.cuda.get_device_name() if cuda else f"cpu, {os.cpu_count()} cores",
                "model": {"method": arguments.method, **recipe.model},
                "batch": shape,
                "attention": {form: attention_of(form) for form in FORMS},
                "largest_loss_difference": differences,
                "versions": versions(),
                "git_revision": git_revision(),
                "load_average": os.getloadavg(),
                "results": rows,
            },
        )


if __name__ == "__main__":
    main()
