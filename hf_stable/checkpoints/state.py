"""State of a run's processes in memory, for a checkpoint: tensors by name, sharded or not."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from hf_stable.errors import CheckpointError
from hf_stable.parallel import unwrap_model


@dataclass(frozen=True)
class State:
    """State after an optimizer step.

    Args:
        tensors: Tensors by "model/NAME" or "optimizer/NAME/KIND". NAME is the name of a parameter
            or buffer, and KIND a key of the optimizer's state. DTensors are this process's shards
            of a whole. A tied weight appears once, under the name of its source, as Transformers
            saves it.
        param_groups: Parameter groups of the optimizer, with names instead of parameters.
        random: Random states of every process's generators, one row of bytes per process.
        scalars: JSON-serializable values of the training loop.
        describe: Function that writes config and tokenizer into a folder.
    """

    tensors: dict[str, torch.Tensor]
    param_groups: list[dict[str, Any]]
    random: dict[str, torch.Tensor]
    scalars: dict[str, Any]
    describe: Callable[[Path], None]

    @property
    def sharded(self) -> bool:
        return any(isinstance(tensor, DTensor) for tensor in self.tensors.values())

    def staged(self) -> "State":
        """Return a copy in CPU memory, which training does not change."""
        tensors = {name: each.to("cpu", copy=True) for name, each in self.tensors.items()}
        return replace(self, tensors=tensors, param_groups=copy.deepcopy(self.param_groups))


def take_state(
    model: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator,
    scalars: dict[str, Any], tokenizer: Any = None,
) -> State:  # fmt: skip
    """Return the current state of a run; collective. Its tensors are not copies."""
    tensors, groups = tensors_of(model, optimizer)
    inner = unwrap_model(model)
    config, generation = copy.deepcopy(inner.config), copy.deepcopy(inner.generation_config)
    config.architectures = [type(inner).__name__.removeprefix("FSDP")]
    config.dtype = str(inner.dtype).removeprefix("torch.")

    def describe(folder: Path) -> None:
        config.save_pretrained(folder)
        generation.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    return State(tensors, groups, _random_states(accelerator), copy.deepcopy(scalars), describe)


def tensors_of(
    model: Any, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return tensors and groups for `State`; an unused optimizer is filled with its zeros."""
    if not optimizer.state:
        _begin(optimizer)
    weights, state = cast(tuple[dict[str, Any], dict[str, Any]], get_state_dict(model, optimizer))
    for name in unwrap_model(model).all_tied_weights_keys:
        weights.pop(name, None)
    tensors = {f"model/{name}": weight for name, weight in weights.items()}
    for name, kinds in state["state"].items():
        for kind, value in kinds.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"optimizer state {kind} of {name} is {value!r}, not a tensor")
            tensors[f"optimizer/{name}/{kind}"] = value
    return tensors, state["param_groups"]


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW its initial state.

    torch would take a step of learning rate 0 for it, which Adam's bias correction and
    sigma-Reparam count.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group["fused"] else "cpu"
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def put_tensors(
    model: Any,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    groups: list[dict[str, Any]],
) -> None:
    """Restore tensors from `tensors_of`, or others with the same names, shapes and shards.

    Learning rates, weight decay and betas of the optimizer are kept: the recipe may change them.
    """
    weights: dict[str, Any] = {}
    own = [
        {**saved, **{key: value for key, value in group.items() if key != "params"}}
        for saved, group in zip(groups, optimizer.param_groups, strict=True)
    ]
    state: dict[str, Any] = {"state": {}, "param_groups": own}
    for key, tensor in tensors.items():
        part, name = key.split("/", 1)
        if part == "model":
            weights[name] = tensor
        else:
            name, kind = name.rsplit("/", 1)
            state["state"].setdefault(name, {})[kind] = tensor
    for name, source in unwrap_model(model).all_tied_weights_keys.items():
        weights[name] = weights[source]
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def check_names(
    place: Path, found: dict[str, tuple[int, ...]], expected: dict[str, torch.Tensor]
) -> None:
    """Refuse tensors of another model or optimizer.

    Args:
        place: Folder of the checkpoint, for the error message.
        found: Shapes of the tensors in `place`, by name.
        expected: Tensors of the run, by name.

    Raises:
        CheckpointError: If they differ; names the first differences.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    differences = [
        f"  {name}: {found.get(name, 'nothing')} there, {wanted.get(name, 'nothing')} here"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{place} belongs to another model or optimizer; {len(differences)} tensors differ:\n"
            + "\n".join(differences[:10])
            + "\nUndo the change of the recipe, or give another output folder."
        )


def _random_states(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Gather the generators' states of all processes, from which dropout draws."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    gathered: dict[str, Any] = {
        name: accelerator.gather(state[None].to(accelerator.device))
        for name, state in states.items()
    }
    return {name: rows.cpu() for name, rows in gathered.items()}


def put_random_states(states: dict[str, torch.Tensor], accelerator: Accelerator) -> None:
    """Restore the generators' states; keep the seeds if the number of processes has changed."""
    if len(states["cpu"]) != accelerator.num_processes:
        return
    # A clone, because torch reads a generator's state as aligned words, and a row of a file is not
    # aligned: a second process ended with SIGSEGV.
    row = accelerator.process_index
    torch.set_rng_state(states["cpu"][row].clone())
    if "cuda" in states and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][row].clone())
