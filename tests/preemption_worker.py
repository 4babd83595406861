"""Run by a launcher with gloo: a loop that stops as `training` does, and a checkpoint that is slow.

torchrun --nproc_per_node 2 preemption_worker.py FOLDER SECONDS ROUNDS LOADER_WORKERS

FOLDER gets rank-R.pid when rank R works, saving-R while it saves, ends.jsonl with a line for every
round that ended (rank, step, signal), and preempted.json. SECONDS is how long a checkpoint takes.
If FOLDER has a file stuck-R, rank R comes to its fourth step and does not move any more, nor does
its watchdog; that of the others ends them.
"""
# ruff: noqa: E402

import json
import os
import sys
import time
from pathlib import Path

# As under the command line: the package must not import Transformers for this.
sys.argv[0] = "hf-stable"

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from hf_stable.preemption import EXIT_PREEMPTED, StopSignals, ignore_signals, mark_preempted
from hf_stable.watchdog import Watchdog

HANG_TIMEOUT = 2.0


def main(folder: Path, seconds: float, rounds: int, loader_workers: int) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    stuck = [file.name for file in folder.glob("stuck-*")]
    timeout = HANG_TIMEOUT if stuck and f"stuck-{rank}" not in stuck else 0
    for _ in range(rounds):
        with (
            StopSignals() as stop,
            Watchdog(folder / "heartbeats", rank, world_size, timeout) as watchdog,
        ):
            step = steps_until_stopped(folder, stop, watchdog, loader_workers)
            (folder / f"saving-{rank}").touch()
            watchdog.beat(step, "checkpoint")
            time.sleep(seconds)
            if rank == 0:
                mark_preempted(folder, step, stop.requested)
            with (folder / "ends.jsonl").open("a") as file:
                file.write(
                    json.dumps({"rank": rank, "step": step, "signal": stop.requested}) + "\n"
                )
            dist.barrier()
    dist.destroy_process_group()
    sys.exit(EXIT_PREEMPTED)


def steps_until_stopped(
    folder: Path, stop: StopSignals, watchdog: Watchdog, loader_workers: int
) -> int:
    rank = dist.get_rank()
    loader = DataLoader(range(10**9), num_workers=loader_workers, worker_init_fn=ignore_signals)
    for step, _ in enumerate(loader):
        watchdog.beat(step, "data")
        while (folder / f"stuck-{rank}").exists() and step == 3:
            time.sleep(0.1)
        time.sleep(0.02)
        watchdog.beat(step, "update")
        told = torch.tensor(float(stop.requested))
        dist.all_reduce(told)
        if told:
            return step + 1
        if step == 0:
            (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
    raise AssertionError("nobody stopped the loop")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
