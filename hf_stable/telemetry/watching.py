"""Watch a model during training, with hooks that exist only in sampled steps.

    with watch(model, optimizer, every=100) as watcher:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            numbers = watcher.end_step()  # None unless the step was sampled

Invariant: a watched step computes the same loss and weights as an unwatched one, bit for
bit.
"""

from typing import Any, Self

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .names import Numbers
from .sample import Sample, Subject


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    every: int = 100,
    bounds_every: int = 1000,
    first_step: int = 0,
) -> "Watcher":
    """Watch a causal LM during training; `names` lists the measured numbers.

    Gradient accumulation, gradient checkpointing, autocast, blocks compiled one by one, DDP and
    FSDP2 are supported. A sampled step needs a copy of this process's share of the weights and one
    pass over every activation. Attention that is not computed by one of our kernels is computed a
    second time, without gradients and in chunks. Other steps have no hooks and no cost.

    In a sampled step, a deep copy or a pickle of the model would include the hooks. `state_dict` is
    unchanged.

    Args:
        model: StableGPT or any Transformers causal LM, with or without DDP. The bounds need our
            attention and are left out for other models.
        optimizer: Optimizer of the model. Without it, updates are not measured, and weights and
            gradients are measured in `end_step` unless `gradients` is called earlier.
        every: Steps between samples, starting with the first step. 0 disables sampling.
        bounds_every: Steps between measurements of spectral norms and bounds. They are in the first
            sample and in the first sample at or after each multiple. 0 disables them.
        first_step: Number of steps taken before.

    Raises:
        ValueError: If the model is compiled in another way than with `layer.compile()`, is already
            watched, or is not a causal LM.
    """
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    wrapped = any(isinstance(module, torch._dynamo.OptimizedModule) for module in inner.modules())
    if wrapped or inner._compiled_call_impl is not None or _compiles(inner.forward):
        raise ValueError(
            f"{type(inner).__name__} is compiled in a way that drops hooks: compile its blocks one "
            "by one and in place, with `layer.compile()` or a recipe's training.compile."
        )
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    for module in inner.modules():
        if isinstance(module, FSDPModule):
            # A forward pass without a backward pass leaves gathered parameters, freed later.
            module.reshard()
    return Watcher(Subject(inner, optimizer), every, bounds_every, first_step)


def _compiles(function: Any) -> bool:
    """Return True if torch.compile made the function, which then calls modules without hooks."""
    return "_torchdynamo_orig_callable" in dir(function)


class Watcher:
    """Context manager returned by `watch`; on exit it restores the model."""

    def __init__(self, subject: Subject, every: int, bounds_every: int, first_step: int) -> None:
        self._subject = subject
        self._every, self._bounds_every = every, bounds_every
        self._step = first_step
        self._sample: Sample | None = None

    def __enter__(self) -> Self:
        self._begin_step()
        return self

    def __exit__(self, *_: object) -> None:
        if self._sample is not None:
            self._sample.remove()
        self._sample = None

    def gradients(self) -> None:
        """Measure the gradients now, before they are clipped.

        Without this call, they are measured when the optimizer steps, clipped or not.
        """
        if self._sample is not None:
            self._sample.look_at_gradients()

    def end_step(self) -> Numbers | None:
        """End a step, after the optimizer's step; collective if there are several processes.

        Returns:
            The step's numbers by name, the same on all processes, or None for a step that was not
            sampled.
        """
        sample, self._sample = self._sample, None
        numbers = None if sample is None else sample.end()
        self._step += 1
        self._begin_step()
        return numbers

    def _begin_step(self) -> None:
        step = self._step + 1
        if self._every == 0 or (step != 1 and step % self._every):
            return
        self._sample = Sample(self._subject, self._has_bounds(step))

    def _has_bounds(self, step: int) -> bool:
        # A function of the step alone, so that a resumed run measures at the same steps.
        every = self._bounds_every
        return every > 0 and (step == 1 or step // every > (step - self._every) // every)
