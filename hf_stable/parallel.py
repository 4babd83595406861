"""One process or many: wrapping, gradient synchronization, clipping and full state dicts.

accelerate launches, places and autocasts, and wraps whole copies. Shards are made here, the same
way on every device: accelerate ignores its FSDP plugin on a CPU without a word, and where it reads
it from a launcher's file it sums gradients in bf16.
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .errors import RecipeError
from .sharding import Sharding


def build_accelerator(
    precision: Literal["fp32", "bf16"],
    trackers: Sequence[Any],
    project_dir: str,
    timeout: timedelta,
) -> Accelerator:
    """Make the process's accelerator; `accelerate launch` and `torchrun` set what it finds.

    Args:
        timeout: of collectives and of waiting for the main process.

    Raises:
        RecipeError: for a tracker that is not installed, processes that accelerate does not see, or
            a precision that is another in the launcher's config file.
    """
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise RecipeError(
                f"training.trackers names {tracker}, which is not installed: "
                f"pip install {tracker}, or take it out."
            )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise RecipeError(
            f"training.precision is {precision}, but the launcher's config file has "
            f"mixed_precision: {launched}; set it to 'no' there, the recipe decides."
        )
    # accelerate keeps one state a process; a second run in it may want another precision.
    AcceleratorState._reset_state()
    # Without a second copy of the gradients beside the buckets in which they are summed.
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    # gloo beside NCCL for what is offloaded to host memory
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else None
    handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
    # Shards are made by `wrap`; a plugin and a mesh of accelerate's own would only be in the way.
    with patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_PARALLELISM_CONFIG="false"):
        accelerator = Accelerator(
            # Without this word accelerate takes a launcher's processes for single ones on a CPU.
            cpu=not torch.accelerator.is_available(),
            mixed_precision="bf16" if precision == "bf16" else "no",
            log_with=list(trackers) or None,
            project_dir=project_dir,
            kwargs_handlers=handlers,
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != processes:
        raise RecipeError(
            f"the launcher started {processes} processes, but accelerate sees "
            f"{accelerator.num_processes}: start them with torchrun --nproc_per_node {processes}."
        )
    return accelerator


def wrap(
    model: Any,
    make_optimizer: Callable[[Any], torch.optim.AdamW],
    accelerator: Accelerator,
    sharding: Sharding,
) -> tuple[Any, torch.optim.AdamW]:
    """Wrap the model for the processes at hand and make its optimizer.

    Args:
        make_optimizer: called with the Transformers model.

    Returns:
        The model itself (one process, or shards, which are made in place) or DDP around it, and the
        plain torch optimizer.

    Raises:
        RecipeError: for `cpu_offload` where it cannot work.
    """
    if sharding.is_sharded:
        _check_offload(model, accelerator, sharding)
        _shard(model, accelerator, sharding)
        # Called so, it adds autocast, and wraps nothing around the model.
        model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return model, make_optimizer(model)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    return model, optimizer.optimizer


def _check_offload(model: Any, accelerator: Accelerator, sharding: Sharding) -> None:
    if sharding.cpu_offload and accelerator.device.type == "cpu":
        raise RecipeError("training.cpu_offload has no effect on a CPU: set it to false.")
    if sharding.cpu_offload and model.config.sigma_reparam:
        raise RecipeError(
            "training.cpu_offload does not work with model.sigma_reparam, whose singular vectors "
            "stay on the device: set it to false."
        )


def _mesh(accelerator: Accelerator, sharding: Sharding) -> DeviceMesh:
    """(processes,), or for hsdp (replicas, shard_size): adjacent ranks share a copy."""
    if not dist.is_initialized():  # one process without a launcher, a mesh of one
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(store=store, rank=0, world_size=1)
    device = accelerator.device.type
    if sharding.kind == "fsdp2":
        return init_device_mesh(device, (sharding.processes,), mesh_dim_names=("shard",))
    shape, names = (sharding.replicas, sharding.shard_size), ("replicate", "shard")
    return init_device_mesh(device, shape, mesh_dim_names=names)


def _shard(model: Any, accelerator: Accelerator, sharding: Sharding) -> None:
    """Make every block, the head, the embedding and what is left a unit of `fully_shard`.

    Numbers are those of autocast over whole copies: weights are fp32 and gathered in bf16 only
    where a matrix product would round them, gradients are summed over processes in fp32, and the
    residual stream and the statistics of norms stay fp32. Blocks of sigma-Reparam are gathered in
    fp32, gains included: their products round gain / sigma * W. (Gains of other blocks' norms are
    gathered in bf16 with the rest of their unit.)
    """
    mesh = _mesh(accelerator, sharding)
    wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if accelerator.mixed_precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    options: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy() if sharding.cpu_offload else OffloadPolicy(),
    }
    again = {"reshard_after_forward": sharding.reshard_after_forward}
    for layer in model.model.layers:
        block = wide if model.config.sigma_reparam else narrow
        fully_shard(layer, mp_policy=block, **again, **options)
    if not model.config.tie_word_embeddings:
        # Its backward pass begins where its forward pass ends.
        fully_shard(model.lm_head, mp_policy=narrow, reshard_after_forward=False, **options)
        fully_shard(model.model.embed_tokens, mp_policy=wide, **again, **options)
    fully_shard(model, mp_policy=wide, **options)


def unwrap_model(model: Any) -> Any:
    """Return the Transformers model inside DDP, the only wrapper that is a separate module."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def gradient_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are summed over whole copies in the last microbatch of a step only.

    Shards sum theirs in every microbatch: no process ever holds the gradients of a whole model.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def end_processes() -> None:
    """Leave the process group, as torch wants before a process exits."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def all_max(value: torch.Tensor) -> torch.Tensor:
    """Largest of each element over all processes, in place; a NaN counts as infinite there."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        value.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def all_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Return True if weights and optimizer state are finite on all processes; collective."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [*model.parameters(), *filter(torch.is_tensor, states)]
    local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    broken = not all(each.isfinite().all() for each in local)
    device = next(model.parameters()).device
    return not all_max(torch.tensor([float(broken)], device=device)).item()


def full_weights(model: Any) -> dict[str, Any]:
    """Unsharded weights in CPU memory by parameter name; collective.

    A tied weight is there once, under its source's name, as Transformers saves it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    for name in unwrap_model(model).all_tied_weights_keys:
        weights.pop(name, None)
    return weights
