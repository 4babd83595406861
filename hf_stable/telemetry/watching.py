"""Watching a model train: hooks for the sampled steps, and no trace of them outside.

    with watch(model, optimizer, every=100) as watcher:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            numbers = watcher.end_step()  # None unless the step was sampled

Law of this package: a watched step computes the loss and the weights of an unwatched one, bit by
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
    """Watch a causal LM train; see `names` for what is measured.

    Works with accumulation, gradient checkpointing, autocast, blocks compiled one by one, DDP and
    FSDP2. A sampled step costs a copy of this process's share of the weights and a look at every
    activation; attention that no kernel of ours computes is computed a second time, without
    gradients and in chunks. Other steps cost nothing: no hook is there.

    Args:
        model: a StableGPT or any Transformers causal LM, in DDP or not. What needs attention of
            ours (bounds) is left out for others.
        optimizer: what updates the model; without it there are no numbers of updates, and weights
            and gradients are looked at in `end_step` unless `gradients` is called before.
        every: steps between samples; the first step is one. 0 never samples.
        bounds_every: steps between spectral norms and bounds, which the first sample has and then
            the first at or after each multiple. 0 never.
        first_step: steps that were taken before.

    In a sampled step a deep copy or a pickle of the model would take the hooks along; `state_dict`
    is what it always is.

    Raises:
        ValueError: for a model that is compiled otherwise than `layer.compile()` does, one that is
            watched already, and what is no causal LM.
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
            # After a forward pass without a backward, parameters are whole and soon freed.
            module.reshard()
    return Watcher(Subject(inner, optimizer), every, bounds_every, first_step)


def _compiles(function: Any) -> bool:
    """Whether torch.compile made a function, which calls modules without their hooks."""
    return "_torchdynamo_orig_callable" in dir(function)


class Watcher:
    """What `watch` returns; a context manager that leaves the model as it was."""

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
        """Look at the gradients now, before they are clipped.

        Without this call they are looked at when the optimizer steps, clipped or not.
        """
        if self._sample is not None:
            self._sample.look_at_gradients()

    def end_step(self) -> Numbers | None:
        """Say that a step is over, after the optimizer's; collective where processes share it.

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
        # A function of the step alone, so that a run that is resumed looks as it would have.
        every = self._bounds_every
        return every > 0 and (step == 1 or step // every > (step - self._every) // every)
