"""Peak memory of a training step on two CPU processes, beside what `hf-stable plan` computes.

    python scripts/bench/memory.py --output scripts/bench/results/cpu_memory.json

Measured is what torch's CPU allocator has given out at once (its own profiler records allocations
and releases), in the steps after the first, of each process; the larger one counts. What gloo
allocates for itself is not in it, nor is the runtime.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from hf_stable import StableGPTForCausalLM, parallel
from hf_stable.memory import Memory, memory, shapes
from hf_stable.optim import adamw, clip_gradients, parameter_groups
from hf_stable.recipes import Recipe, load_recipe
from hf_stable.records import git_revision, versions, write_json
from hf_stable.reporting import describe_device
from hf_stable.sharding import Sharding, resolve_sharding

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
GOAL = 0.10
FSDP2, WHOLE = "training.sharding=fsdp2", "training.reshard_after_forward=false"
CASES = {
    "ddp": ["training.sharding=ddp"],
    "ddp, recomputed blocks": ["training.sharding=ddp", "training.gradient_checkpointing=true"],
    "ddp, bf16": ["training.sharding=ddp", "training.precision=bf16"],
    "fsdp2": [FSDP2],
    "fsdp2, not resharded": [FSDP2, WHOLE],
    "fsdp2, recomputed blocks": [FSDP2, "training.gradient_checkpointing=true"],
    "fsdp2, bf16": [FSDP2, "training.precision=bf16"],
}


def case_recipe(arguments: argparse.Namespace, name: str) -> Recipe:
    """The recipe of a case: two micro batches a step."""
    sizes = {"micro": arguments.micro_batch, "global": 2 * 2 * arguments.micro_batch}
    batches = [f"training.{key}_batch_size={value}" for key, value in sizes.items()]
    plain = "training.precision=fp32"
    return load_recipe(
        [RECIPES / path for path in arguments.recipe], [plain, *batches, *CASES[name]]
    )


def build(recipe: Recipe) -> StableGPTForCausalLM:
    """The recipe's model with the attention that a CPU gets."""
    model = StableGPTForCausalLM._from_config(recipe.model_config(), attn_implementation="sdpa")
    if recipe.training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def computed(recipe: Recipe, sharding: Sharding) -> Memory:
    with torch.device("meta"):
        model = build(recipe)
    return memory(
        shapes(model, recipe, "cpu"),
        sharding,
        accumulates=True,
        recompute=recipe.training.gradient_checkpointing,
    )


def train_steps(recipe: Recipe, steps: int, folder: Path) -> tuple[int, Sharding]:
    """Allocated bytes at the peak of the steps after the first, of this process."""
    settings = recipe.training
    torch.set_num_threads(1)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        patience = timedelta(minutes=10)
        accelerator = parallel.build_accelerator(settings.precision, [], str(folder), patience)
        sharding = resolve_sharding(settings, accelerator.num_processes, accelerator.num_processes)
        torch.manual_seed(0)
        model, optimizer = parallel.wrap(
            build(recipe),
            lambda wrapped: adamw(parameter_groups(wrapped, learning_rate=1e-3, weight_decay=0.1)),
            accelerator,
            sharding,
        )
        shape = (2, settings.micro_batch_size, recipe.data.sequence_length)
        ids = torch.randint(0, recipe.tokenizer.vocab_size, shape)
        for number in range(steps):
            with record_function("steady" if number else "first"):
                for index, batch in enumerate(ids):
                    with parallel.gradient_sync(model, last=index == 1):
                        model(batch, labels=batch, use_cache=False).loss.backward()
                clip_gradients(model, optimizer, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    trace = folder / f"trace-{accelerator.process_index}.json"
    profiler.export_chrome_trace(str(trace))
    return _peak(json.loads(trace.read_text())["traceEvents"]), sharding


def _peak(events: list[dict[str, Any]]) -> int:
    """Most bytes at once from the first step on, by address: what a thread of gloo releases, the
    profiler does not see, but an address that is given out again was free."""
    begin = min(event["ts"] for event in events if event["name"] == "steady")
    alive: dict[int, int] = {}
    now = peak = 0
    changes = (event for event in events if event["name"] == "[memory]")
    for event in sorted(changes, key=lambda event: event["ts"]):
        address, count = event["args"]["Addr"], event["args"]["Bytes"]
        now -= alive.pop(address, 0)
        if count > 0:
            alive[address] = count
            now += count
        if event["ts"] >= begin:
            peak = max(peak, now)
    return peak


def work(arguments: argparse.Namespace) -> None:
    """One process of one case; leaves its number in the folder."""
    folder = Path(arguments.folder)
    peak, _ = train_steps(case_recipe(arguments, arguments.case), arguments.steps, folder)
    write_json(folder / f"rank-{os.environ['RANK']}.json", {"allocated": peak})
    parallel.end_processes()


def measure(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Launch a case on two processes and set its peak beside the computed one."""
    recipe = case_recipe(arguments, name)
    estimate = computed(recipe, resolve_sharding(recipe.training, 2, 2, {}))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        command += ["--standalone", __file__, "--case", name, "--folder", folder]
        command += ["--recipe", *arguments.recipe, "--steps", str(arguments.steps)]
        command += ["--micro-batch", str(arguments.micro_batch)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        ranks = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("rank-*"))]
    measured = max(rank["allocated"] for rank in ranks)
    return {
        "case": name,
        "computed": estimate.total,
        "measured": measured,
        "ratio": estimate.total / measured,
        "met": abs(estimate.total / measured - 1) <= GOAL,
        "parts": estimate.parts(),
        "moments": {name: moment.total for name, moment in estimate.moments.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", nargs="+", default=["base/50m.yaml"], help="under recipes/")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        return work(arguments)
    rows = []
    for name in arguments.cases:
        rows.append(measure(arguments, name))
        print(f"{name}: computed over measured {rows[-1]['ratio']:.3f}", flush=True)
    table = Table("two processes", "computed", "measured", "ratio", "goal", "peak at")
    for row in rows:
        megabytes = [f"{row[key] / 1e6:,.0f} MB" for key in ("computed", "measured")]
        peak = max(row["moments"], key=row["moments"].get)
        table.add_row(row["case"], *megabytes, f"{row['ratio']:.3f}", f"1 +- {GOAL}", peak)
    Console().print(table)
    if arguments.output:
        content = {
            "device": describe_device(torch.device("cpu")),
            "recipe": arguments.recipe,
            "micro_batch_size": arguments.micro_batch,
            "versions": versions(),
            "git_revision": git_revision(),
            "results": rows,
        }
        write_json(arguments.output, content)


if __name__ == "__main__":
    main()
