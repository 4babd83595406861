"""What watching costs: training steps of a recipe's model, watched and not.

Goals: looking every 100 steps adds at most 2 % to training, looking at every step at most
25 %, on the `50m` recipe.

    python scripts/bench/telemetry.py --output scripts/bench/results/cpu_telemetry.json

Every round times each kind of step once, in an order that changes; ratios are taken within a round,
and medians over rounds are reported. A step here is smaller than the recipe's, so that a CPU can do
it: what telemetry does once a step (weights, updates, Adam's moments, bounds) weighs more than in
training. On CUDA the recipe's microbatch is taken, in bf16.
"""

import argparse
import random
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hf_stable import StableGPTForCausalLM
from hf_stable.kernels.backends import choose_attention
from hf_stable.optim import adamw, parameter_groups
from hf_stable.recipes import load_recipe
from hf_stable.records import git_revision, versions, write_json
from hf_stable.reporting import describe_device
from hf_stable.telemetry import watch

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# Name of a kind of step: (whether it is looked at, with bounds).
KINDS = {"unwatched": None, "between looks": (False, False), "look": (True, False),
         "look with bounds": (True, True)}  # fmt: skip


class Steps:
    """Training steps of one model: microbatches, clipping and AdamW."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        recipe = load_recipe([RECIPES / path for path in arguments.recipe], [])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        config = recipe.model_config()
        self.backend, _ = choose_attention(config, self.device, packed=False)
        model = StableGPTForCausalLM._from_config(config, attn_implementation=self.backend)
        self.model = model.to(self.device).train()
        groups = parameter_groups(self.model, learning_rate=1e-3, weight_decay=0.1)
        self.optimizer = adamw(groups)
        self.bounds_every = recipe.telemetry.bounds_every
        self.shape = (arguments.micro_batch, recipe.data.sequence_length)
        if self.device.type == "cuda":
            self.shape = (recipe.training.micro_batch_size, recipe.data.sequence_length)
        self.micro_steps = arguments.micro_steps
        shape = (self.micro_steps, *self.shape)
        self.ids = torch.randint(0, config.vocab_size, shape, device=self.device)

    def seconds(self, kind: tuple[bool, bool] | None) -> float:
        """One step; making and removing hooks is in the time."""
        self._synchronize()
        start = time.perf_counter()
        if kind is None:
            self._step(None)
        else:
            looks, bounds = kind
            # A first step that is not the first of all is no sample of every=10**9.
            settings = {"every": 1 if looks else 10**9, "first_step": 1}
            with watch(self.model, self.optimizer, bounds_every=int(bounds), **settings) as watcher:
                self._step(watcher)
        self._synchronize()
        return time.perf_counter() - start

    def _step(self, watcher: Any) -> None:
        for ids in self.ids:
            is_cuda = self.device.type == "cuda"
            with torch.autocast("cuda", torch.bfloat16) if is_cuda else nullcontext():
                self.model(ids, labels=ids, use_cache=False).loss.backward()
        if watcher is not None:
            watcher.gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if watcher is not None:
            watcher.end_step()
        self.optimizer.zero_grad(set_to_none=True)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(steps: Steps, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by kind of step; one round of warm-up is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    order, names = random.Random(0), list(KINDS)
    for number in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            elapsed = steps.seconds(KINDS[name])
            if number:
                seconds[name].append(elapsed)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """Median over rounds of a kind's time over that of an unwatched step in the same round."""
    pairs = zip(seconds[name], seconds["unwatched"], strict=True)
    return statistics.median(one / other for one, other in pairs)


def goals(ratios: dict[str, float], bounds_every: int) -> list[dict[str, Any]]:
    """The two goals from the ratios of single steps."""
    bounds = (ratios["look with bounds"] - ratios["look"]) / bounds_every
    look = ratios["look"] + bounds
    rare = (ratios["look"] + 99 * ratios["between looks"]) / 100 + bounds
    found = {"training, a look every 100 steps": (rare, 1.02), "training, every step": (look, 1.25)}
    return [
        {"what": what, "ratio": value, "bar": bar, "met": value <= bar}
        for what, (value, bar) in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", nargs="+", default=["base/50m.yaml"], help="under recipes/")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences, on a CPU")
    parser.add_argument("--micro-steps", type=int, default=4, help="microbatches of a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = Steps(arguments)
    seconds = measure(steps, arguments.rounds)
    ratios = {name: ratio(seconds, name) for name in KINDS}
    judged = goals(ratios, steps.bounds_every)
    table = Table("step", "ms", "/ unwatched", "goal")
    for name, value in ratios.items():
        table.add_row(name, f"{1e3 * statistics.median(seconds[name]):.0f}", f"{value:.3f}", "")
    for goal in judged:
        table.add_row(goal["what"], "", f"{goal['ratio']:.4f}", f"<= {goal['bar']}")
    Console().print(table)
    if arguments.output:
        content = {
            "device": describe_device(steps.device),
            "recipe": arguments.recipe,
            "attn_implementation": steps.backend,
            "tokens_of_a_step": steps.ids.numel(),
            "micro_steps": steps.micro_steps,
            "versions": versions(),
            "git_revision": git_revision(),
            "seconds": seconds,
            "ratios": ratios,
            "goals": judged,
        }
        write_json(arguments.output, content)


if __name__ == "__main__":
    main()
