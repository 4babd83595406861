"""Estimate the cost of a plan before running it."""

import time
from collections import Counter

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hf_stable.check import flops_per_token
from hf_stable.model import StableGPTForCausalLM
from hf_stable.optim import adamw, parameter_groups
from hf_stable.recipes import Recipe
from hf_stable.wording import counted

from .plan import Plan, Planned

_TIMED_STEPS = 3


def preview(plan: Plan, runs: list[Planned], workers: int) -> RenderableType:
    """Return the grid, the FLOPs of all runs, and their time estimated from a few steps."""
    rates = sorted({run.learning_rate for run in runs})
    counts = Counter((run.method, run.variant, run.learning_rate) for run in runs)
    table = Table("method", *(f"{rate:g}" for rate in rates), title="runs by learning rate")
    for row in dict.fromkeys((run.method, run.variant) for run in runs):
        table.add_row(" ".join(row).strip(), *(str(counts[(*row, rate)] or "") for rate in rates))
    flops = {run.method: _flops_per_token(run.recipe) for run in runs}
    total = sum(flops[run.method] * _tokens(run.recipe) for run in runs)
    first = runs[0]
    rate = flops[first.method] * first.recipe.tokens_per_step / step_seconds(first.recipe)
    hours = total / rate / workers / 3600
    text = (
        f"{counted(len(runs), 'run')} into {plan.folder}, {total:.3g} FLOP; about {hours:.2g} "
        f"hours with {counted(workers, 'worker')}, if each is as fast as one is now "
        f"({rate:.3g} FLOP/s over {_TIMED_STEPS} steps) and without validation and telemetry"
    )
    return Group(table, Text(text))


def _tokens(recipe: Recipe) -> int:
    return recipe.num_steps * recipe.tokens_per_step


def _flops_per_token(recipe: Recipe) -> float:
    with torch.device("meta"):
        model = StableGPTForCausalLM(recipe.model_config())
    return flops_per_token(model, recipe.data.sequence_length)


def step_seconds(recipe: Recipe) -> float:
    """Return the seconds of an optimizer step on random tokens here, without the first step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, settings = recipe.model_config(), recipe.training
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with device:
        model = StableGPTForCausalLM(config).train()
    optimizer = adamw(parameter_groups(model, learning_rate=1e-4, weight_decay=0.0))
    shape = (settings.micro_batch_size, recipe.data.sequence_length)
    ids = torch.randint(0, config.vocab_size, shape, device=device)
    micro_steps = settings.global_batch_size // settings.micro_batch_size
    start = 0.0
    for step in range(1 + _TIMED_STEPS):
        for _ in range(micro_steps):
            model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter() if step == 0 else start
    return (time.perf_counter() - start) / _TIMED_STEPS
