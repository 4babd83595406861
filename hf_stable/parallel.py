"""One process or many: wrapping, gradient synchronisation, clipping and full state dicts.

accelerate launches, places and wraps; on a CPU it ignores its FSDP plugin without a word, so there
the same policy (every block a unit, the head its own) is applied by `fully_shard`.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .errors import RecipeError

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)


def _precision_policy(precision: str) -> MixedPrecisionPolicy:
    """bf16 compute over fp32 master weights; gradients are summed over processes in fp32."""
    compute = torch.bfloat16 if precision == "bf16" else None
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)


def build_accelerator(
    precision: Literal["fp32", "bf16"],
    sharding: Literal["auto", "ddp", "fsdp2"],
    trackers: Sequence[Any],
    project_dir: str,
) -> Accelerator:
    """Make the process's accelerator; `accelerate launch` and `torchrun` set what it finds.

    Args:
        sharding: "auto" keeps what the launcher's config file says.
    """
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise RecipeError(
                f"training.trackers names {tracker}, which is not installed: "
                f"pip install {tracker}, or take it out."
            )
    # accelerate keeps one state a process; a second run in it may want another precision.
    AcceleratorState._reset_state()
    plugin = None
    if sharding == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            mixed_precision_policy=_precision_policy(precision),
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(
        # Without this word accelerate takes the processes of a launcher for single ones on a CPU.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        fsdp_plugin=plugin,
        log_with=list(trackers) or None,
        project_dir=project_dir,
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != processes:
        raise RecipeError(
            f"the launcher started {processes} processes, but accelerate sees "
            f"{accelerator.num_processes}: start them with torchrun --nproc_per_node {processes}."
        )
    if sharding == "ddp" and accelerator.is_fsdp2:
        raise RecipeError(
            "training.sharding is ddp, but the launcher's config file asks for FSDP: "
            "set training.sharding to auto or fsdp2, or launch without that file."
        )
    return accelerator


def wrap(
    model: Any,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    accelerator: Accelerator,
    sharding: str,
) -> tuple[Any, torch.optim.Optimizer]:
    """Wrap the model for the processes at hand and make its optimizer.

    Args:
        make_optimizer: called with the Transformers model.

    Returns:
        The model itself (one process, or FSDP2, which works in place) or DDP around it, and the
        plain torch optimizer.
    """
    if sharding == "fsdp2" and not accelerator.is_fsdp2:
        _shard_on_cpu(model, accelerator)
        return model, make_optimizer(model)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    return model, optimizer.optimizer


def _shard_on_cpu(model: Any, accelerator: Accelerator) -> None:
    if not dist.is_initialized():  # one process without a launcher, a mesh of one
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    options: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (accelerator.num_processes,)),
        "mp_policy": _precision_policy(accelerator.mixed_precision),
    }
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if not model.config.tie_word_embeddings:
        fully_shard(model.lm_head, **options)
    fully_shard(model, **options)


def unwrap_model(model: Any) -> Any:
    """The Transformers model inside DDP, which is the only wrapper that is a module of its own."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def gradient_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are summed over processes in the last microbatch of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
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


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(model: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Scale all gradients so that their global L2 norm is at most `max_norm`.

    Returns:
        The norm before clipping, over all parameters and processes, 0-d.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = _plain(nn.utils.get_total_norm(gradients))
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def full_state(
    model: Any, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Unsharded CPU state of model and optimizer, by parameter name; collective.

    A tied weight is there once, under its source's name, as Transformers saves it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    for name in unwrap_model(model).all_tied_weights_keys:
        weights.pop(name, None)
    return weights, state


def load_full_state(
    model: Any, optimizer: torch.optim.Optimizer, weights: dict[str, Any], state: dict[str, Any]
) -> None:
    """Put back what `full_state` gave, whatever the number of processes; collective."""
    for name, source in unwrap_model(model).all_tied_weights_keys.items():
        weights[name] = weights[source]
    options = _FULL if dist.is_initialized() else StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)
