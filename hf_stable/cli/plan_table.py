"""Output of `hf-stable plan`: one line per layout, then the memory of the best one."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from hf_stable.planning import USABLE, Plan, Way


def print_plans(plans: Sequence[Plan], price: float | None, console: Console) -> None:
    """Print a table of all plans of one recipe.

    Args:
        plans: Plans of the recipe, one per number of GPUs.
        price: Price of one GPU for one hour, in any currency; None leaves out the cost.
        console: Console to print to.
    """
    first, recipe = plans[0], plans[0].recipe
    tokens = recipe.num_steps * recipe.tokens_per_step
    console.print(
        f"{recipe.name}: {first.parameters / 1e6:,.1f}M parameters, {tokens / 1e9:,.1f}B tokens, "
        f"{first.gpu_memory:g} GB a GPU, of which tensors get {USABLE:.0%}"
    )
    table = Table(box=box.MARKDOWN)
    for name in ("GPUs", "sharding", "micro batch", "GB a GPU", "tokens/s", "days", "GPU-hours"):
        table.add_column(name, justify="left" if name == "sharding" else "right", no_wrap=True)
    if price is not None:
        table.add_column("cost", justify="right", no_wrap=True)
    for plan in plans:
        for way in plan.ways:
            cells = _cells(plan, way)
            if price is not None:
                hours = plan.hours(way)
                cells.append("-" if hours is None else f"{hours * plan.gpus * price:,.0f}")
            table.add_row(*cells)
    console.print(table)
    best = plans[-1].best
    if best is not None:
        parts = ", ".join(
            f"{name} {count / 1e9:,.1f}" for name, count in best.memory.parts().items() if count
        )
        console.print(f"GB of {best.gpus} x {_words(best)}: {parts}")
    console.print(
        "* the fastest that fits. Every number is computed, not measured; speed is a roofline of "
        "FLOPs and bytes at the rates of an "
        f"{first.device.name}, with all exchange hidden that can be."
    )


def _words(way: Way) -> str:
    sharding = way.sharding
    if not sharding.is_sharded:
        return "ddp" if sharding.processes > 1 else "one GPU"
    words = sharding.kind + (f" {sharding.shard_size}" if sharding.kind == "hsdp" else "")
    words += ", resharded" if sharding.reshard_after_forward else ", not resharded"
    return words + (", offloaded" if sharding.cpu_offload else "")


def _cells(plan: Plan, way: Way) -> list[str]:
    micro = f"{way.micro_batch_size}" + (", recomputed" if way.recompute else "")
    size = f"{way.memory.total / 1e9:,.1f}"
    start = [str(way.gpus), _words(way), micro, size if way.fits else f"{size}: too much"]
    hours = plan.hours(way)
    if way.tokens_per_second is None or hours is None:
        return [*start, "-", "-", "-"]
    mark = "*" if way is plan.best else ""
    speed = f"{way.tokens_per_second / 1e3:,.0f}k{mark}"
    return [*start, speed, f"{hours / 24:,.1f}", f"{hours * plan.gpus:,.0f}"]
