"""Statistics of the output head: log Z and logits, measured on each chunk of logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_stable.model.functional_stable_gpt import softcap, statistics_dtype
from hf_stable.model.loss_stable_gpt import (
    LINEAR_CROSS_ENTROPY_FUNCTIONS,
    RowFunction,
    linear_cross_entropy,
)

from .gauges import Gauges, Reduced, world_size
from .names import Numbers
from .observe import ObserveGradient, observe

# Rows of logits measured together.
_ROWS = 256


class HeadGauge:
    """Hooks of one head. The head must not be compiled."""

    def __init__(self, head: nn.Module, gauges: Gauges, cap: float | None) -> None:
        self._cap = cap
        self._input = gauges.sums("head/input", 2)
        self._input_grad = gauges.gradient_sums("head/input_grad", 2)
        # Pairs of a sum and its count: log Z, logits, z-losses.
        self._log_z = gauges.sums("head/log_z", 2)
        self._logits = gauges.sums("head/logits", 2)
        self._z_loss = gauges.sums("head/z_loss", 2)
        self._largest = gauges.maxima("head/largest", 2)
        self._restore: Callable[[], None] | None = None
        self._calls = 0

    def before(self, head: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Measure the chunks of logits of a loss as they are computed; a forward pre-hook.

        If a forward pass computes a loss and then also logits, only the loss is measured.
        """
        self._calls += 1
        if not head.training or self._calls > 1:
            return None
        functions, device = LINEAR_CROSS_ENTROPY_FUNCTIONS, args[0].device.type
        own = functions._local_mapping.get(device)
        original = functions.get(device, linear_cross_entropy)
        functions[device] = partial(original, around=self._around)

        def restore() -> None:
            del functions[device]
            if own is not None:
                functions[device] = own

        self._restore = restore
        observe(args[0], self._input)
        return ObserveGradient.apply(args[0], self._input_grad), *args[1:]

    def after(self, head: Any, args: Any, output: Any) -> None:
        """Restore the loss function; a forward hook that also runs after an error."""
        if self._restore is None:
            return
        self._restore()
        self._restore = None
        if isinstance(output, tuple):  # StableGPT's loss, cross entropy and z-loss
            self._z_loss[0] += output[2].detach()
            self._z_loss[1] += 1
        elif output is not None:  # None if the head failed
            self._look_at_logits(output.detach())

    def forget(self) -> None:
        """Reset the count of calls; call it before a forward pass of the model."""
        self._calls = 0

    def _around(self, row_function: RowFunction) -> RowFunction:
        def look(
            logits: torch.Tensor,
            labels: torch.Tensor,
            cap: float | None,
            z_loss: float,
            gradient: bool,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if logits.numel() == 0:
                return row_function(logits, labels, cap, z_loss, gradient)
            self._add_logits(logits)
            picked = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
            picked = softcap(picked.to(statistics_dtype(picked)), cap)
            # The row function overwrites the logits, but log Z follows from its result.
            cross_entropy, squares = row_function(logits, labels, cap, z_loss, gradient)
            self._add_log_z(cross_entropy + picked, labels >= 0)
            return cross_entropy, squares

        return look

    def _look_at_logits(self, logits: torch.Tensor) -> None:
        for rows in logits.flatten(0, -2).split(_ROWS):
            self._add_logits(rows)
            wide = softcap(rows.to(statistics_dtype(rows)), self._cap)
            log_z = wide.logsumexp(-1)
            self._add_log_z(log_z, torch.ones_like(log_z, dtype=torch.bool))

    def _add_logits(self, logits: torch.Tensor) -> None:
        self._logits[0] += logits.sum(dtype=statistics_dtype(logits))
        self._logits[1] += logits.numel()
        torch.maximum(self._largest[1], logits.amax().double(), out=self._largest[1])

    def _add_log_z(self, log_z: torch.Tensor, counted: torch.Tensor) -> None:
        log_z = log_z.double()
        self._log_z[0] += torch.where(counted, log_z, 0.0).sum()
        self._log_z[1] += counted.sum()
        largest = torch.where(counted, log_z, -torch.inf).amax()
        torch.maximum(self._largest[0], largest, out=self._largest[0])


def head_numbers(reduced: Reduced, has_z_loss: bool) -> Numbers:
    """Return the named numbers of the head from sums over all processes."""
    found: Numbers = {}
    (log_z, targets), (logits, count) = reduced["head/log_z"], reduced["head/logits"]
    if targets:
        found["head/log_z_mean"] = log_z / targets
        found["head/log_z_max"] = reduced["head/largest"][0]
    if count:
        found["head/logit_mean"] = logits / count
        found["head/logit_max"] = reduced["head/largest"][1]
    z_loss, calls = reduced["head/z_loss"]
    if has_z_loss and calls:
        # Each process divides by the mean number of targets per process.
        found["head/z_loss"] = z_loss / world_size()
    return found
