"""Sharding of the model over processes, from the recipe or the accelerate config."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import RecipeError
from .recipes.schema import TrainingRecipe

_YES = ("1", "true", "yes", "y", "on", "t")


@dataclass(frozen=True)
class Sharding:
    """Placement of weights, gradients and optimizer state on the processes.

    `fsdp2` and `hsdp` are PyTorch's `fully_shard`: every block, the embedding and the head are
    units that are gathered when they compute. `hsdp` shards among `shard_size` processes and
    copies across such groups (Zhao et al. 2023, PyTorch FSDP, section 3.2.2).
    """

    kind: Literal["ddp", "fsdp2", "hsdp"]
    """Kind of sharding; `ddp` keeps whole copies, also for a single process."""
    processes: int
    shard_size: int
    """Number of processes that share one copy; 1 under ddp."""
    reshard_after_forward: bool = False
    """True if blocks are gathered again for the backward pass, so that few are whole at a time."""
    cpu_offload: bool = False
    """True if shards of weights, gradients and optimizer state are kept in host memory."""

    @property
    def is_sharded(self) -> bool:
        """True if weights are DTensors."""
        return self.kind != "ddp"

    @property
    def replicas(self) -> int:
        """Number of whole copies of the model."""
        return self.processes // self.shard_size


def resolve_sharding(
    settings: TrainingRecipe,
    processes: int,
    processes_per_node: int,
    environment: Mapping[str, str] = os.environ,
) -> Sharding:
    """Return the sharding of the recipe; `auto` is that of the accelerate config, or ddp.

    Args:
        settings: Training section of the recipe.
        processes: Number of processes of the run.
        processes_per_node: Number of processes on one machine.
        environment: Environment variables in which the launcher puts its config file.

    Raises:
        RecipeError: The group size does not divide the processes, the launcher's config file
            contradicts the recipe, or it asks for something unsupported.
    """
    launched = _launched(processes, environment)
    if settings.sharding == "auto":
        return launched or Sharding("ddp", processes, 1)
    chosen = _chosen(settings, processes, processes_per_node)
    if launched is not None and launched != chosen:
        raise RecipeError(
            f"training.sharding is {settings.sharding} ({_words(chosen)}), but the launcher's "
            f"config file asks for FSDP ({_words(launched)}): set training.sharding to auto, and "
            "the file decides, or launch without that file."
        )
    return chosen


def _chosen(settings: TrainingRecipe, processes: int, processes_per_node: int) -> Sharding:
    if settings.sharding == "ddp":
        return Sharding("ddp", processes, 1)
    flags = (settings.reshard_after_forward, settings.cpu_offload)
    if settings.sharding == "fsdp2":
        return Sharding("fsdp2", processes, processes, *flags)
    size = settings.shard_size or processes_per_node
    return Sharding("hsdp", processes, _group_size(size, processes, "training.shard_size"), *flags)


def _group_size(size: int, processes: int, name: str) -> int:
    if processes % size:
        raise RecipeError(
            f"{name} is {size}, which does not divide {processes} processes: choose one of "
            + ", ".join(str(each) for each in range(1, processes + 1) if processes % each == 0)
        )
    return size


def _launched(processes: int, environment: Mapping[str, str]) -> Sharding | None:
    """Return the launcher's FSDP settings, or None if its config file does not ask for FSDP."""
    _refuse_what_is_not_done(environment)
    if not _is_set("ACCELERATE_USE_FSDP", environment):
        return None
    flags = (
        _is_set("FSDP_RESHARD_AFTER_FORWARD", environment, otherwise="true"),
        _is_set("FSDP_OFFLOAD_PARAMS", environment),
    )
    replicas = _size("dp_replicate_size", environment)
    if replicas == 1:
        return Sharding("fsdp2", processes, processes, *flags)
    shards = _size("dp_shard_size", environment)
    if replicas * shards != processes:
        raise RecipeError(
            f"the launcher's config file has parallelism_config_dp_replicate_size {replicas} x "
            f"parallelism_config_dp_shard_size {shards}, but there are {processes} processes: "
            "their product must be that."
        )
    return Sharding("hsdp", processes, shards, *flags)


def _refuse_what_is_not_done(environment: Mapping[str, str]) -> None:
    for name in ("tp_size", "cp_size", "sp_size"):
        if _size(name, environment) > 1:
            raise RecipeError(
                f"the launcher's config file has parallelism_config_{name}: "
                f"{_size(name, environment)}, which is not done here: take it out."
            )
    if not _is_set("ACCELERATE_USE_FSDP", environment):
        return
    if environment.get("FSDP_VERSION", "1") != "2":
        raise RecipeError(
            "the launcher's config file asks for FSDP version 1: set fsdp_version: 2 in it."
        )
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING", environment):
        raise RecipeError(
            "the launcher's config file has fsdp_activation_checkpointing: true, which is the "
            "recipe's training.gradient_checkpointing here: set that, and false in the file."
        )


def _is_set(name: str, environment: Mapping[str, str], otherwise: str = "false") -> bool:
    return environment.get(name, otherwise).lower() in _YES


def _size(name: str, environment: Mapping[str, str]) -> int:
    return int(environment.get(f"PARALLELISM_CONFIG_{name.upper()}", "1"))


def _words(sharding: Sharding) -> str:
    if not sharding.is_sharded:
        return "whole copies"
    resharded = "" if sharding.reshard_after_forward else "not "
    offload = ", offloaded" if sharding.cpu_offload else ""
    return f"shards of {sharding.shard_size}, {resharded}resharded after forward{offload}"
