"""Memory, speed, days and cost of a run on a number of GPUs, for each kind of sharding.

All of it is computed on the meta device; `scripts/bench/memory.py` holds the memory against two
measured processes on a CPU.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from .check import build_model
from .errors import RecipeError
from .memory import Memory, Shapes, memory, shapes
from .model import StableGPTForCausalLM
from .recipes import Recipe
from .roofline import Device, tokens_per_second
from .sharding import Sharding

# Of a GPU's memory, what is left for tensors: CUDA's context, NCCL's buffers and the holes of an
# allocator take the rest (an assumption; nothing of it is measured yet).
USABLE = 0.92


@dataclass(frozen=True)
class Way:
    """One way to hold the model: without recomputing if possible, then in large micro batches."""

    gpus: int
    sharding: Sharding
    micro_batch_size: int
    recompute: bool
    memory: Memory
    fits: bool
    tokens_per_second: float | None
    """None where it does not fit, or is offloaded, whose speed is not estimated."""
    chosen: bool
    """True if it is the sharding of the recipe itself."""


@dataclass(frozen=True)
class Plan:
    """All ways to run a recipe on one number of GPUs."""

    recipe: Recipe
    gpus: int
    device: Device
    gpu_memory: float
    """GB (1e9 bytes) of one GPU."""
    parameters: int
    ways: list[Way]

    @property
    def best(self) -> Way | None:
        """The fastest way that fits."""
        fitting = [way for way in self.ways if way.tokens_per_second is not None]
        return max(fitting, key=lambda way: way.tokens_per_second or 0.0, default=None)

    def hours(self, way: Way) -> float | None:
        """Hours of the recipe's tokens."""
        if way.tokens_per_second is None:
            return None
        tokens = self.recipe.num_steps * self.recipe.tokens_per_step
        return tokens / way.tokens_per_second / 3600


def plan(
    recipe: Recipe,
    gpus: int,
    gpu_memory: float | None = None,
    gpus_per_node: int = 8,
    device: Device | None = None,
) -> Plan:
    """Compute what a recipe needs on `gpus` GPUs.

    Args:
        gpu_memory: of one GPU, in GB (1e9 bytes); the device's capacity unless given.
        device: an H200 unless given.

    Raises:
        RecipeError: for numbers of GPUs that the batch or the nodes do not allow.
    """
    _check_world(recipe, gpus, gpus_per_node)
    device = device or Device()
    gpu_memory = gpu_memory or device.capacity
    planner = _Planner(recipe, gpu_memory, gpus_per_node, device)
    ways = [planner.way(sharding) for sharding in _shardings(recipe, gpus, gpus_per_node)]
    return Plan(recipe, gpus, device, gpu_memory, planner.model.num_parameters(), ways)


def _check_world(recipe: Recipe, gpus: int, gpus_per_node: int) -> None:
    batch = recipe.training.global_batch_size
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise RecipeError(
            f"{gpus} GPUs are no whole number of nodes of {gpus_per_node}: change --gpus or "
            "--gpus-per-node"
        )
    if batch % gpus:
        fitting = [str(count) for count in range(1, min(batch, 2 * gpus) + 1) if batch % count == 0]
        raise RecipeError(
            f"training.global_batch_size {batch} is not a multiple of {gpus} GPUs; these would do: "
            f"{', '.join(fitting)}"
        )


def _shardings(recipe: Recipe, gpus: int, gpus_per_node: int) -> list[Sharding]:
    """From the least communication to the least memory; what the recipe says is among them."""
    if gpus == 1:
        return [Sharding("ddp", 1, 1)]
    offload = recipe.training.cpu_offload
    ways = [Sharding("ddp", gpus, 1)]
    ways += [Sharding("fsdp2", gpus, gpus, again, offload) for again in (False, True)]
    size = recipe.training.shard_size or gpus_per_node
    if 1 < size < gpus:
        if gpus % size:
            raise RecipeError(f"training.shard_size {size} does not divide {gpus} GPUs")
        ways += [Sharding("hsdp", gpus, size, again, offload) for again in (False, True)]
    return ways


class _Planner:
    """Shapes of each micro batch are computed once."""

    def __init__(
        self, recipe: Recipe, gpu_memory: float, gpus_per_node: int, device: Device
    ) -> None:
        self.recipe, self.gpus_per_node, self.device = recipe, gpus_per_node, device
        self.usable = USABLE * gpu_memory * 1e9
        self.model: StableGPTForCausalLM = build_model(recipe)
        self.shapes: dict[int, Shapes] = {}

    def way(self, sharding: Sharding) -> Way:
        """The first setting that fits, from the recipe's own on; the smallest where none does."""
        way = None
        for micro, recompute in self._settings(sharding.processes):
            recipe = self._with_micro_batch(micro)
            found = self._memory(recipe, sharding, recompute)
            fits = found.total <= self.usable
            speed = None
            if fits and not sharding.cpu_offload:
                speed = tokens_per_second(
                    self.model,
                    recipe,
                    sharding,
                    self.device,
                    gpus_per_node=self.gpus_per_node,
                    recompute=recompute,
                )
            chosen = self._is_chosen(sharding)
            way = Way(sharding.processes, sharding, micro, recompute, found, fits, speed, chosen)
            if fits:
                return way
        assert way is not None
        return way

    def _settings(self, gpus: int) -> Iterator[tuple[int, bool]]:
        """The recipe's micro batch, then smaller ones; at each size first without recomputing."""
        training = self.recipe.training
        share = training.global_batch_size // gpus
        sizes = [
            size
            for size in range(min(training.micro_batch_size, share), 0, -1)
            if share % size == 0
        ]
        wanted = [True] if training.gradient_checkpointing else [False, True]
        return ((size, recompute) for recompute in wanted for size in sizes)

    def _with_micro_batch(self, size: int) -> Recipe:
        training = dataclasses.replace(self.recipe.training, micro_batch_size=size)
        return dataclasses.replace(self.recipe, training=training)

    def _memory(self, recipe: Recipe, sharding: Sharding, recompute: bool) -> Memory:
        training = recipe.training
        if training.micro_batch_size not in self.shapes:
            self.shapes[training.micro_batch_size] = shapes(self.model, recipe)
        sequences = training.global_batch_size // sharding.processes
        return memory(
            self.shapes[training.micro_batch_size],
            sharding,
            accumulates=sequences > training.micro_batch_size,
            recompute=recompute,
        )

    def _is_chosen(self, sharding: Sharding) -> bool:
        training = self.recipe.training
        if training.sharding in ("auto", "ddp"):
            return training.sharding == sharding.kind
        again = training.reshard_after_forward
        return (training.sharding, again) == (sharding.kind, sharding.reshard_after_forward)
