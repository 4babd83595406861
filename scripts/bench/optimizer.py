"""Host time of the optimizer's side of a step: whole parameters, and shards of two processes.

Goal: a step of AdamW on shards costs at most 1.3 times the host time of one on whole parameters.

    python scripts/bench/optimizer.py --output scripts/bench/results/cpu_optimizer.json

Parameters are small, so that the time is that of launching work, not of the work. It is the CPU
time of the thread that takes the step, which other programs on the machine hardly change. `torch,
one by one` and `torch, fused` are `torch.optim.AdamW` given the DTensors themselves. All cases live
in one launch of two gloo processes and take turns; medians over rounds are reported, of the slower
process. The ratio is the median of those within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_stable import optim
from hf_stable.records import git_revision, versions, write_json
from hf_stable.reporting import describe_device

GOAL = 1.3
Step = Callable[[], object]
Times = dict[str, list[float]]
"""Milliseconds of each round by case."""


def parameters(count: int, width: int, mesh: Any) -> list[nn.Parameter]:
    """Random parameters with random gradients; shards of them where a mesh is given."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        pair = [torch.randn(width, width, generator=generator) for _ in range(2)]
        if mesh is not None:
            pair = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in pair]
        parameter = nn.Parameter(pair[0])
        parameter.grad = pair[1]
        found.append(parameter)
    return found


def steps(count: int, width: int, mesh: Any) -> dict[str, Step]:
    """Return the timed cases by name, each with separate parameters."""

    def group() -> list[dict[str, Any]]:
        params = parameters(count, width, mesh)
        return [{"name": "all", "params": params, "lr": 1e-3, "weight_decay": 0.1}]

    found: dict[str, Step] = {"AdamW": optim.adamw(group()).step}
    if mesh is not None:
        found["AdamW (torch, fused)"] = torch.optim.AdamW(group(), fused=True).step
        found["AdamW (torch, one by one)"] = torch.optim.AdamW(group(), foreach=False).step
    stable, measured = optim.stable_adamw(group()), optim.adamw(group())
    stable.step(), measured.step()
    found["StableAdamW"] = stable.step
    found["update_norm"] = lambda: optim.update_norm(measured)
    found["fractions_below_eps"] = lambda: optim.fractions_below_eps(measured)
    return found


def work(arguments: argparse.Namespace) -> None:
    """One process: milliseconds of every case, by round, after a round of warm-up."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    size = (arguments.parameters, arguments.width)
    cases = {f"whole: {name}": step for name, step in steps(*size, None).items()}
    cases |= {f"shards: {name}": step for name, step in steps(*size, mesh).items()}
    times: Times = {name: [] for name in cases}
    for number in range(arguments.rounds + 1):
        for name, step in cases.items():
            dist.barrier()
            start = time.thread_time()
            step()
            if number:
                times[name].append(1e3 * (time.thread_time() - start))
    Path(arguments.folder, f"{dist.get_rank()}.json").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def measure(arguments: argparse.Namespace) -> list[Times]:
    """Launch two processes; what each of them measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        command += ["--standalone", __file__, "--folder", folder]
        for name in ("parameters", "width", "rounds"):
            command += [f"--{name}", str(getattr(arguments, name))]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        return [json.loads(file.read_text()) for file in Path(folder).iterdir()]


def ratio(times: Times) -> float:
    """Median over rounds of AdamW's time on shards over that on whole parameters."""
    pairs = zip(times["shards: AdamW"], times["whole: AdamW"], strict=True)
    return statistics.median(one / other for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parameters", type=int, default=300)
    parser.add_argument("--width", type=int, default=16, help="rows and columns of a parameter")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        return work(arguments)
    ranks = measure(arguments)
    milliseconds = {
        name: max(statistics.median(times[name]) for times in ranks) for name in ranks[0]
    }
    worst = max(ratio(times) for times in ranks)
    table = Table("case", "ms a step", "us a parameter")
    for name, value in milliseconds.items():
        table.add_row(name, f"{value:.2f}", f"{1e3 * value / arguments.parameters:.2f}")
    Console().print(table)
    print(f"AdamW on shards over AdamW on whole parameters: {worst:.2f} (goal: <= {GOAL})")
    if arguments.output:
        content = {
            "device": describe_device(torch.device("cpu")),
            "parameters": arguments.parameters,
            "width": arguments.width,
            "versions": versions(),
            "git_revision": git_revision(),
            "milliseconds": milliseconds,
            "ratio": worst,
            "goal": GOAL,
            "met": worst <= GOAL,
        }
        write_json(arguments.output, content)


if __name__ == "__main__":
    main()
