"""The training loop, explicit and read top to bottom; `stepping.Stepper.take` is one step of it.

Why not `transformers.Trainer`: it hides non-finite losses, has no clean place to refuse a step,
cannot go back to an earlier one, and cannot say where in the data it is. (A StableGPT trains under
it like any other model.)
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
    """What `train` leaves: `folder/model` is a Transformers folder with the trained weights.

    Args:
        steps: that were taken.
        validation_perplexity: the last one; NaN for a run that was preempted before its first.
        stopped: why `stop` ended the run early, or None; then there is no `folder/model`.
        preempted: whether a signal ended it, after a checkpoint; the same call resumes it.
        signal: the number of the signal that this process got; 0 if another one was told.
        was_finished: whether there was nothing left to do, so that nothing was done.
    """

    folder: Path
    steps: int
    validation_perplexity: float
    stopped: str | None = None
    preempted: bool = False
    signal: int = 0
    was_finished: bool = False


# Told the step, its loss and its gradient norm, it says why the run should end, or None.
Stop = Callable[[int, float, float], str | None]


def train(recipe: Recipe, *, resume: str = "auto", stop: Stop | None = None) -> TrainResult:
    """Train a model as the recipe says, validate it, and write it as a Transformers folder.

    SIGTERM, SIGUSR1 and SIGINT end it after the step that it is at, with a checkpoint.

    Args:
        resume: "auto" resumes from the newest checkpoint in the recipe's output folder, if there is
            one, and refuses another recipe or other data than that run's; "longer" allows more
            steps than that run's, and plans the learning rate again for them; "changed" allows any
            difference; "never" refuses a folder that holds a run. A run that has finished is left
            as it is, unless it is to be longer.
        stop: asked after every step; a run that it ends is validated, and writes no model.

    Raises:
        DivergedError: when the guard gives up, at the latest after MAX_NON_FINITE_STEPS steps in a
            row without a finite loss and gradient.
        CheckpointError: when the output folder holds something that cannot be gone on from, or is
            another process's.
        DataError, RecipeError: when data or recipe cannot work.
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
    """A run from where it stands to its end, through every rollback."""

    def __init__(
        self, run: Run, stop: Stop | None, signals: StopSignals, watchdog: Watchdog
    ) -> None:
        self._run, self._stop, self._signals, self._watchdog = run, stop, signals, watchdog
        self._perplexity = math.nan
        self._saved: int | None = None  # in the background, and not yet told of

    def take(self) -> TrainResult:
        """Train until the end, a signal, or the word of `stop`."""
        if "rollback" in self._run.recipe.guard.actions and not self._run.first_step:
            self._checkpoint(0, None)  # trouble may come before the first regular one
        while isinstance(ended := self._stretch(), Decision):
            self._wait()
            self._run = self._run.rolled_back(ended)
        run = self._run
        if not ended.preempted and ended.stopped is None:
            folder = save_model(run)
            run.reporter.event("finished", ended.steps, f"model written to {folder}")
        return ended

    def _stretch(self) -> TrainResult | Decision:
        """Optimizer steps from `run.first_step` on, until the run ends or is to be rolled back."""
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
        """What is due after a step; a result if the run ends with it."""
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
        """Whether the state after a step may take the place of an older checkpoint.

        After a refused step it may not: the weights themselves may be at fault, and the run is to
        end with a checkpoint from before.

        Raises:
            DivergedError: when what would be the finished model is not finite.
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
        """Write the state after `done` steps; one in the background is told of when it is there."""
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
        """End in good order: all of it is on the disk before any process leaves."""
        run = self._run
        self._wait()
        if run.accelerator.is_main_process:
            mark_preempted(run.folder, done, self._signals.requested)
        number = self._signals.requested
        name = signal.Signals(number).name if number else None
        what = "interrupted" if number == signal.SIGINT else "preempted"
        text = f"{what}, with a checkpoint; the same command resumes the run"
        run.reporter.event("preempted", done, text, signal=name)
        # A scheduler may end the main process's machine as soon as another one's has left.
        run.reporter.close()
        run.accelerator.wait_for_everyone()
        return TrainResult(run.folder, done, self._perplexity, preempted=True, signal=number)


def _is_due(done: int, every: int, total_steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return done == total_steps or (every > 0 and done % every == 0)


@torch.no_grad()
def _validate(run: Run, done: int) -> float:
    """Perplexity of the first blocks of the validation text; z-loss is not in it."""
    blocks, accelerator = run.corpus.validation, run.accelerator
    count = min(run.recipe.training.evaluate_blocks, len(blocks))
    size = run.recipe.training.micro_batch_size
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    run.model.eval()
    for start in range(0, count, size * accelerator.num_processes):
        first = start + accelerator.process_index * size
        # A process without blocks left still takes part, since shards are gathered together.
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
    # exp overflows beyond 709 nats, which only a run that has diverged reaches.
    perplexity = math.inf if loss > 700 else math.exp(loss)
    text = f"validation loss {loss:.4f}, perplexity {perplexity:.2f}"
    run.reporter.event("validation", done, text, loss=loss, perplexity=perplexity)
    return perplexity
