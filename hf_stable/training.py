"""Explicit training loop, to be read from top to bottom; `stepping.Stepper.take` is one step of it.

`transformers.Trainer` is not used here: it hides non-finite losses, has no clean place to refuse a
step, cannot return to an earlier step, and does not report its position in the data. (A StableGPT
model still trains under it like any other model.)
"""

import contextlib
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import garbage, optim, parallel
from .checkpoints.directory import folder_of
from .errors import DivergedError
from .guard import Decision
from .preemption import Preparation, StopSignals, clear_mark, mark_preempted
from .preparing import prepare_run
from .recipes import Recipe
from .resuming import finished_at
from .run_lock import run_lock
from .runs import Run, save_model
from .stepping import Step, Stepper
from .watchdog import FOLDER as HEARTBEATS
from .watchdog import Watchdog, clear_heartbeats


@dataclass(frozen=True)
class TrainResult:
    """Result of `train`. `folder/model` is a Transformers folder with the trained weights.

    Args:
        folder: Output folder of the run.
        steps: Number of optimizer steps taken.
        validation_perplexity: Last validation perplexity; NaN if the run was preempted before its
            first validation.
        stopped: Reason why `stop` ended the run early, or None. A stopped run has no
            `folder/model`.
        preempted: True if a signal ended the run after a checkpoint; the same call resumes it.
        signal: Number of the signal that this process received; 0 if another process received it.
        was_finished: True if the run was already finished, so that nothing was done.
    """

    folder: Path
    steps: int
    validation_perplexity: float
    stopped: str | None = None
    preempted: bool = False
    signal: int = 0
    was_finished: bool = False


# Takes the step, its loss and its gradient norm. Returns a reason to end the run, or None.
Stop = Callable[[int, float, float], str | None]


def train(recipe: Recipe, *, resume: str = "auto", stop: Stop | None = None) -> TrainResult:
    """Train and validate the recipe's model, and write it as a Transformers folder.

    SIGTERM, SIGUSR1 and SIGINT end the run after the current step, with a checkpoint.

    Args:
        recipe: Complete recipe of the run.
        resume: One of:

            - "auto": Resume from the newest checkpoint in the recipe's output folder, if there is
              one. Refuse a folder whose run has another recipe or other data.
            - "longer": Like "auto", but allow more steps than before. The learning-rate schedule
              is planned again for the new length.
            - "changed": Allow any difference.
            - "never": Refuse a folder that holds a run.

            A finished run is left unchanged, unless it is to become longer.
        stop: Called after every step. A run that it ends is validated, but writes no model.

    Returns:
        Summary of the run.

    Raises:
        DivergedError: If the guard gives up, at the latest after MAX_NON_FINITE_STEPS consecutive
            steps without a finite loss and gradient.
        CheckpointError: If the output folder cannot be resumed from, or another process uses it.
        DataError: If the data cannot be used.
        RecipeError: If the recipe cannot work.
    """
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") == "0":
            stack.enter_context(run_lock(Path(recipe.output)))
        perplexity = finished_at(recipe, resume)
        if perplexity is not None:
            steps = recipe.num_steps
            return TrainResult(Path(recipe.output), steps, perplexity, was_finished=True)
        if os.environ.get("RANK", "0") == "0":
            clear_heartbeats(Path(recipe.output) / HEARTBEATS)
        with Preparation(Path(recipe.output)):
            run = prepare_run(recipe, resume)  # until here Ctrl-C ends at once
        garbage.resume()
        stack.callback(run.reporter.close)
        stack.callback(run.checkpoints.close)
        signals = stack.enter_context(StopSignals())
        watchdog = stack.enter_context(_watchdog(run))
        if run.accelerator.is_main_process:
            clear_mark(run.folder)
        return _Course(run, stop, signals, watchdog).take()


def _watchdog(run: Run) -> Watchdog:
    accelerator, timeout = run.accelerator, run.recipe.training.hang_timeout
    place = accelerator.process_index, accelerator.num_processes
    return Watchdog(run.folder / HEARTBEATS, *place, timeout)


class _Course:
    """The rest of a run, from its current step to its end, through every rollback."""

    def __init__(
        self, run: Run, stop: Stop | None, signals: StopSignals, watchdog: Watchdog
    ) -> None:
        self._run, self._stop, self._signals, self._watchdog = run, stop, signals, watchdog
        self._perplexity = math.nan
        self._saved: int | None = None  # step of a background checkpoint that is not yet reported

    def take(self) -> TrainResult:
        """Train until the last step, a signal, or a reason from `stop`."""
        if "rollback" in self._run.recipe.guard.actions and not self._run.first_step:
            self._checkpoint(0, None)  # a rollback may be needed before the first regular one
        while isinstance(ended := self._stretch(), Decision):
            self._wait()
            self._run = self._run.rolled_back(ended)
        run = self._run
        if not ended.preempted and ended.stopped is None:
            folder = save_model(run)
            run.reporter.event("finished", ended.steps, f"model written to {folder}")
        return ended

    def _stretch(self) -> TrainResult | Decision:
        """Take steps from `run.first_step` on, until the run ends or must be rolled back."""
        run, total_steps = self._run, self._run.recipe.num_steps
        with Stepper(run, self._watchdog) as stepper:
            for step in range(run.first_step, total_steps):
                taken = stepper.take(step, self._signals.requested > 0)
                if taken.decision.action == "rollback":
                    return taken.decision
                if (ended := self._after(step + 1, taken, stepper)) is not None:
                    return ended
        if math.isnan(self._perplexity):
            self._validate(total_steps)
        self._wait()
        return TrainResult(run.folder, total_steps, self._perplexity)

    def _after(self, done: int, taken: Step, stepper: Stepper) -> TrainResult | None:
        """Do the work that is due after a step; return a result if the run ends with it."""
        run, settings, total_steps = (
            self._run,
            self._run.recipe.training,
            self._run.recipe.num_steps,
        )
        reason = self._stop(done, taken.loss, taken.grad_norm) if self._stop is not None else None
        if reason is not None:
            run.reporter.event("stopped", done, f"stopped: {reason}")
            self._validate(done)
            self._wait()
            return TrainResult(run.folder, done, self._perplexity, stopped=reason)
        if _is_due(done, settings.evaluate_every, total_steps):
            self._validate(done)
            stepper.throughput.restart()
        preempted = taken.stopping and done < total_steps
        if preempted or _is_due(done, settings.checkpoint_every, total_steps):
            if self._is_worth_keeping(done, taken):
                self._checkpoint(done, stepper.update_norm())
            stepper.throughput.restart()
        return self._preempted(done) if preempted else None

    def _is_worth_keeping(self, done: int, taken: Step) -> bool:
        """Return True if the state after a step may replace an older checkpoint.

        The state after a refused step may not: its weights may be the cause of the trouble, and
        the run must end with a checkpoint from before it.

        Raises:
            DivergedError: If the final weights or the optimizer state are not finite.
        """
        run, refused = self._run, taken.decision.rule == "non_finite"
        finite = parallel.all_finite(run.model, run.optimizer)
        if not finite and done == run.recipe.num_steps:
            text = "weights or optimizer are not finite after the last step"
            run.reporter.event("diverged", done, text)
            raise DivergedError(f"{run.recipe.name}: {text}; the records are in {run.folder}")
        others = run.recipe.training.checkpoint_every > 0 and done < run.recipe.num_steps
        if finite and not (refused and others):
            return True
        run.reporter.event("no_checkpoint", done, "no checkpoint of a state that is not finite")
        return False

    def _validate(self, done: int) -> None:
        self._watchdog.beat(done, "validation")
        self._perplexity = _validate(self._run, done)
        shares = optim.fractions_below_eps(self._run.optimizer)
        warning = optim.eps_warning(
            {name: share.item() for name, share in shares.items()},
            self._run.recipe.optimizer.eps,
        )
        if warning is not None:
            self._run.reporter.event("warning", done, warning, warning=warning)

    def _checkpoint(self, done: int, update_norm: float | None) -> None:
        """Write the state after `done` steps; report a background checkpoint once it is written."""
        run = self._run
        self._watchdog.beat(done, "checkpoint")
        self._wait()
        run.reporter.sync()
        scalars, held = run.scalars(done, update_norm), run.guard.rollback_to
        run.checkpoints.save(done, run.model, run.optimizer, scalars, held=held)
        self._saved = done
        if not run.recipe.training.asynchronous_checkpoints:
            self._wait()

    def _wait(self) -> None:
        run, step = self._run, self._saved
        run.checkpoints.wait()
        if step is not None:
            name = folder_of(run.folder, step).name
            run.reporter.event("checkpoint", step, f"checkpoint {name}", folder=name)
            self._saved = None

    def _preempted(self, done: int) -> TrainResult:
        """End the run; everything is on disk before any process leaves."""
        run = self._run
        self._wait()
        if run.accelerator.is_main_process:
            mark_preempted(run.folder, done, self._signals.requested)
        number = self._signals.requested
        name = signal.Signals(number).name if number else None
        what = "interrupted" if number == signal.SIGINT else "preempted"
        text = f"{what}, with a checkpoint; the same command resumes the run"
        run.reporter.event("preempted", done, text, signal=name)
        # A scheduler may stop the main process's node as soon as another node's process has left.
        run.reporter.close()
        run.accelerator.wait_for_everyone()
        return TrainResult(run.folder, done, self._perplexity, preempted=True, signal=number)


def _is_due(done: int, every: int, total_steps: int) -> bool:
    """Return True if an event that recurs every `every` steps, and at the end, is due now."""
    return done == total_steps or (every > 0 and done % every == 0)


@torch.no_grad()
def _validate(run: Run, done: int) -> float:
    """Compute the perplexity of the first blocks of the validation text, without z-loss."""
    blocks, accelerator = run.corpus.validation, run.accelerator
    count = min(run.recipe.training.evaluate_blocks, len(blocks))
    size = run.recipe.training.micro_batch_size
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    run.model.eval()
    for start in range(0, count, size * accelerator.num_processes):
        first = start + accelerator.process_index * size
        # A process without blocks left still takes part: the shards are gathered collectively.
        chosen = [blocks[index] for index in range(first, min(first + size, count))] or [blocks[0]]
        batch = {
            key: torch.stack([item[key] for item in chosen]).to(accelerator.device)
            for key in chosen[0]
        }
        output = run.model(**batch, use_cache=False, skip_logits=True)
        if first < count:
            targets = (batch["shift_labels"] >= 0).sum().double()
            sums += torch.stack((output.ce_loss.double() * targets, targets))
    run.model.train()
    total, targets = parallel.all_sum(sums).tolist()
    loss = total / targets
    # exp overflows beyond 709 nats. Only a diverged run reaches that.
    perplexity = math.inf if loss > 700 else math.exp(loss)
    text = f"validation loss {loss:.4f}, perplexity {perplexity:.2f}"
    run.reporter.event("validation", done, text, loss=loss, perplexity=perplexity)
    return perplexity
