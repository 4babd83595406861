"""Laws of plans: memory is that of a real step, and every number moves as it must."""

import dataclasses
import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hf_stable.check import build_model, flops_per_token
from hf_stable.cli.plan_table import print_plans
from hf_stable.errors import RecipeError
from hf_stable.memory import memory, shapes
from hf_stable.planning import Plan, plan
from hf_stable.recipes import Recipe, load_recipe
from hf_stable.roofline import DEVICES, Device, seconds_exchanging, tokens_per_second
from hf_stable.sharding import Sharding

from .training import RECIPES

sys.path.insert(0, str(RECIPES.parent / "scripts" / "bench"))

import memory as bench

LARGE = RECIPES / "base" / "830m.yaml"
# Of a size at which nothing that a plan leaves out matters.
SMALL = [
    "model.hidden_size=256",
    "model.num_hidden_layers=4",
    "tokenizer.vocab_size=4096",
    "data.sequence_length=512",
    "training.micro_batch_size=4",
]


def recipe(*overrides: str, path: Path = LARGE) -> Recipe:
    return load_recipe(path, overrides)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_memory_is_that_of_a_real_step(sharding: str, recompute: str, tmp_path: Path) -> None:
    """One process here; two of them, and 50M parameters, in scripts/bench/memory.py."""
    more = [f"training.sharding={sharding}", f"training.gradient_checkpointing={recompute}"]
    small = load_recipe(RECIPES / "base" / "tiny.yaml", [*SMALL, *more])
    threads = torch.get_num_threads()
    measured, found = bench.train_steps(small, steps=2, folder=tmp_path)
    torch.set_num_threads(threads)
    assert found.kind == sharding
    assert bench.computed(small, found).total == pytest.approx(measured, rel=0.1)


def test_the_recipe_of_the_paper_is_as_fast_as_its_budget_says() -> None:
    """8.6 us a token at 700 and 300 TFLOP/s and 4.3 TB/s: 117k tokens/s (the shape's own sum)."""
    [way] = plan(recipe(), 1, 80).ways
    assert way.fits
    assert way.tokens_per_second == pytest.approx(117e3, rel=0.02)
    flops = flops_per_token(build_model(recipe()), 4096) * (way.tokens_per_second or 0)
    assert flops < 989e12


@pytest.mark.parametrize("name", ["830m", "3b", "8b"])
def test_more_gpus_are_faster_and_never_cheaper(name: str) -> None:
    large = recipe(path=RECIPES / "base" / f"{name}.yaml")
    plans = [plan(large, gpus, 80) for gpus in (8, 16, 64)]
    hours = [_hours(each) for each in plans]
    assert hours == sorted(hours, reverse=True)
    spent = [each.gpus * time for each, time in zip(plans, hours, strict=True)]
    # The update of fewer shards takes longer; nothing else makes few GPUs dearer.
    assert all(later > 0.98 * spent[0] for later in spent)


def _hours(found: Plan) -> float:
    assert found.best is not None
    hours = found.hours(found.best)
    assert hours is not None
    return hours


def test_what_fits_fits_and_what_does_not_says_so() -> None:
    large = recipe(path=RECIPES / "base" / "8b.yaml")
    for found in (plan(large, 8, 80), plan(large, 8, 20)):
        for way in found.ways:
            assert way.fits == (way.memory.total <= 0.92 * found.gpu_memory * 1e9)
            assert (way.tokens_per_second is None) == (not way.fits)
    assert plan(large, 8, 80).best is not None
    assert plan(large, 1, 80).best is None


def test_memory_moves_with_what_decides_it() -> None:
    large = recipe()
    sizes = shapes(build_model(large), large)

    def total(sharding: Sharding, recompute: bool = False, accumulates: bool = True) -> int:
        found = memory(sizes, sharding, accumulates=accumulates, recompute=recompute)
        assert sum(found.parts().values()) == found.total
        return found.total

    whole, shards = Sharding("ddp", 64, 1), Sharding("fsdp2", 64, 64, True)
    kept, groups = (
        dataclasses.replace(shards, reshard_after_forward=False),
        Sharding("hsdp", 64, 8, True),
    )
    assert total(shards) < total(groups) < total(whole)
    assert total(shards) < total(kept)
    assert total(dataclasses.replace(shards, cpu_offload=True)) < total(shards)
    assert total(whole, recompute=True) < total(whole)
    one = Sharding("ddp", 1, 1)
    assert total(one, accumulates=False) < total(one)


def test_exchange_is_hidden_until_it_is_longer_than_compute() -> None:
    large, sharding = recipe(), Sharding("fsdp2", 64, 64, True)
    model = build_model(large)

    def speed(device: Device) -> float:
        return tokens_per_second(model, large, sharding, device, gpus_per_node=8, recompute=False)

    fast, slow = Device(), dataclasses.replace(Device(), network=1e9)
    assert speed(fast) == speed(dataclasses.replace(fast, network=1e12))
    step = large.tokens_per_step / speed(slow)
    exchange = seconds_exchanging(model.num_parameters(), sharding, slow, 8, 1)
    assert exchange < step < 1.01 * exchange


def test_groups_of_a_node_send_less_over_the_network() -> None:
    device, size = Device(), 8_000_000_000
    slow = dataclasses.replace(device, network=5e9)
    groups, shards = Sharding("hsdp", 64, 8, True), Sharding("fsdp2", 64, 64, True)
    assert seconds_exchanging(size, groups, slow, 8, 4) < seconds_exchanging(
        size, shards, slow, 8, 4
    )


@pytest.mark.parametrize(
    ("gpus", "per_node", "reason"),
    [(3, 8, "these would do: 1, 2, 4"), (12, 8, "whole number of nodes"), (1024, 8, "512")],
)
def test_numbers_of_gpus_that_cannot_work_are_refused(
    gpus: int, per_node: int, reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        plan(recipe(), gpus, 80, per_node)


def test_a_gpu_brings_its_memory_and_rates() -> None:
    """Bandwidth alone differs: an H100 is slower, but not by more than its bandwidth is."""
    small = load_recipe(RECIPES / "base" / "tiny.yaml", SMALL)
    plans = {name: plan(small, 1, device=device) for name, device in DEVICES.items()}
    assert {name: each.gpu_memory for name, each in plans.items()} == {"h200": 141, "h100": 80}
    assert plan(small, 1, 20, device=DEVICES["h100"]).gpu_memory == 20
    speeds = {name: each.ways[0].tokens_per_second or 0 for name, each in plans.items()}
    ratio = DEVICES["h100"].memory / DEVICES["h200"].memory
    assert ratio * speeds["h200"] < speeds["h100"] < speeds["h200"]
    console = Console(file=io.StringIO(), width=200)
    print_plans([plans["h100"]], None, console)
    assert "rates of an H100" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_table_has_every_way_and_its_cost() -> None:
    plans = [plan(recipe(), gpus, 80) for gpus in (1, 8)]
    console = Console(file=io.StringIO(), width=200)
    print_plans(plans, 2.0, console)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "computed, not measured" in shown
    assert shown.count("\n|") >= 2 + sum(len(each.ways) for each in plans)
    best = plans[0].best
    assert best is not None
    assert f"{2 * _hours(plans[0]):,.0f}" in shown
