"""One optimizer step: gradients, the guard's decision on them, and the update if it is accepted."""

import contextlib
from dataclasses import dataclass
from typing import Self

import torch

from . import optim, parallel
from .errors import DivergedError
from .guard import Decision, Observation
from .model.sigma_stable_gpt import StableGPTSigmaLinear
from .runs import Run
from .watchdog import Watchdog


@dataclass(frozen=True)
class Step:
    """Outcome of one optimizer step.

    Args:
        decision: Decision of the guard.
        loss: Mean loss of the batch in nats per token, including z-loss.
        grad_norm: Global gradient norm before clipping.
        stopping: True if any process received a stop signal.
    """

    decision: Decision
    loss: float
    grad_norm: float
    stopping: bool


class Stepper:
    """Context manager that takes a run's steps, from `run.first_step` on."""

    def __init__(self, run: Run, watchdog: Watchdog) -> None:
        self._run, self._watchdog = run, watchdog
        settings, total = run.recipe.training, run.recipe.num_steps
        together = settings.micro_batch_size * run.accelerator.num_processes
        self._micro_steps = settings.global_batch_size // together
        self._microbatches = iter(run.loader(run.first_step, total - run.first_step))
        self._watcher, self._qk_clip = run.watch(), run.qk_clip()
        # Norm of the last update, divided by its learning rate.
        self._moved = (
            None if run.update_norm is None else torch.tensor(run.update_norm, dtype=torch.float64)
        )
        self.throughput = run.throughput()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as entered:
            if self._qk_clip is not None:
                entered.enter_context(self._qk_clip)
            entered.enter_context(self._watcher)
            self._inside = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._inside.close()

    def take(self, step: int, stop_requested: bool) -> Step:
        """Take one step.

        Args:
            step: Index of the step, from 0.
            stop_requested: True if this process received a stop signal.

        Returns:
            Outcome of the step.

        Raises:
            DivergedError: If the guard gives the run up; holds its diagnosis.
        """
        run = self._run
        self._watchdog.beat(step, "data")
        batches = [next(self._microbatches) for _ in range(self._micro_steps)]
        self._watchdog.beat(step, "gradients")
        sums = _accumulate(run, batches, stop_requested)
        self._watcher.gradients()
        by, limit = run.recipe.optimizer.clip_by, run.max_grad_norm(step)
        norm = optim.clip_gradients(run.model, run.optimizer, limit, by)
        self._watchdog.beat(step, "update")  # from here this process waits for the others
        loss, z_loss, stopping, norm, moved = self._read(sums, norm)
        decision = run.guard.judge(Observation(step + 1, loss, norm, moved))
        rate = self._update(step, decision)
        _report_decision(run, decision, loss, norm)
        self._watchdog.beat(step, "telemetry")
        if (telemetry := self._watcher.end_step()) is not None:
            run.reporter.telemetry(step + 1, telemetry)
        run.optimizer.zero_grad(set_to_none=True)
        self.throughput.step()
        if step + 1 == run.recipe.num_steps or (step + 1) % run.recipe.training.log_every == 0:
            metrics = {"loss": loss, "z_loss": z_loss, "learning_rate": rate, "grad_norm": norm}
            metrics |= {} if moved is None else {"update_norm": moved}
            run.reporter.train(step + 1, {**metrics, **self.throughput.read()})
        return Step(decision, loss, norm, stopping > 0)

    def update_norm(self) -> float | None:
        """L2 norm of the last update over its learning rate, which the guard has not seen yet."""
        return None if self._moved is None else self._moved.item()

    def _read(
        self, sums: torch.Tensor, norm: torch.Tensor
    ) -> tuple[float, float, float, float, float | None]:
        """Read a step's numbers in one copy from the device.

        The host waits for the device only here, once per step.

        Returns:
            Loss, z-loss, stop requests, gradient norm and the norm of the last update.
        """
        moved, self._moved = self._moved, None
        norms = [norm] if moved is None else [norm, moved]
        # A flipped bit can make the ranks' copies of the weights differ, but all ranks must reach
        # the same decision.
        shared = torch.stack([each.to(sums.device).double() for each in norms])
        parallel.all_max(shared)
        loss, z_loss, stopping, largest, *rest = torch.cat([sums.double(), shared]).tolist()
        return loss, z_loss, stopping, largest, rest[0] if rest else None

    def _update(self, step: int, decision: Decision) -> float:
        """Update the weights if the guard accepts the step; return the learning rate."""
        run = self._run
        factor = run.learning_rate_factor(step) * decision.learning_rate_factor
        rate = run.recipe.optimizer.learning_rate * factor
        optim.set_learning_rate(run.optimizer, factor)
        if decision.action == "accept":
            run.optimizer.step()
            if run.recipe.guard.actions and rate > 0:
                self._moved = optim.update_norm(run.optimizer) / rate
            if self._qk_clip is not None:
                self._qk_clip.clip()
            return rate
        if self._qk_clip is not None:
            self._qk_clip.forget()
        for module in run.model.modules():
            if isinstance(module, StableGPTSigmaLinear):
                # A process that resumes here knows no previous step and takes a power step.
                module.forget_change()
        return rate


def _accumulate(
    run: Run, batches: list[dict[str, torch.Tensor]], stop_requested: bool
) -> torch.Tensor:
    """Accumulate the gradients of one global batch from this process's microbatches.

    Args:
        run: Run that the step belongs to.
        batches: Microbatches of this process.
        stop_requested: True if this process received a stop signal.

    Returns:
        Tensor of shape (3,) on the device, reduced over all processes: mean loss, mean z-loss, and
        a number above 0 if any process received a stop signal.
    """
    device, processes = run.accelerator.device, run.accelerator.num_processes
    targets = torch.stack([(batch["shift_labels"] >= 0).sum() for batch in batches]).sum()
    # Every target of the global batch has the same weight, whatever its microbatch's size. The
    # gradients are averaged over processes, hence the division.
    items = parallel.all_sum(targets.to(device)) / processes
    losses = torch.zeros(2, device=device)
    for index, batch in enumerate(batches):
        inputs = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        with parallel.gradient_sync(run.model, last=index == len(batches) - 1):
            output = run.model(**inputs, num_items_in_batch=items, use_cache=False)
            output.loss.backward()
        losses += torch.stack((output.loss.detach(), output.z_loss))
    told = torch.full((1,), float(stop_requested), device=device)
    return parallel.all_sum(torch.cat((losses, told))) / processes


def _report_decision(run: Run, decision: Decision, loss: float, norm: float) -> None:
    """Record the guard's decision; end the run if the guard gives up.

    Raises:
        DivergedError: If the guard gives up; holds its diagnosis.
    """
    if not decision.reason:
        return
    kind = "non_finite" if decision.rule == "non_finite" else "guard"
    about = {**decision.row(), "loss": loss, "grad_norm": norm}
    run.reporter.event(kind, decision.step, decision.reason, **about)
    if decision.action == "give_up":
        run.reporter.event("diverged", decision.step, decision.reason)
        raise DivergedError(
            f"{run.recipe.name}: {decision.reason} (step {decision.step}; the records are in "
            f"{run.folder})"
        )
