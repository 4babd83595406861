"""The training loop, explicit and read top to bottom: what happens in a step is on one screen.

Why not `transformers.Trainer`: it hides non-finite losses, has no clean place to refuse a step, and
cannot say where in the data it is. (A StableGPT trains under it like any other model.)
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import optim, parallel
from .checkpoints import save_checkpoint
from .errors import DivergedError
from .recipes import Recipe
from .runs import Run, prepare_run, save_model

# More refused updates in a row than this are no glitch: such a run learns nothing any more.
MAX_NON_FINITE_STEPS = 20


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves: `folder/model` is a Transformers folder with the trained weights.

    Args:
        steps: that were taken.
        stopped: why the run ended early, or None; then there is no `folder/model`.
    """

    folder: Path
    steps: int
    validation_perplexity: float
    stopped: str | None = None


# Told the step, its loss and its gradient norm, it says why the run should end, or None.
Stop = Callable[[int, float, float], str | None]


def train(recipe: Recipe, *, resume: str = "auto", stop: Stop | None = None) -> TrainResult:
    """Train a model as the recipe says, validate it, and write it as a Transformers folder.

    Args:
        stop: asked after every step; a run that it ends is validated, and writes no model.
        resume: "auto" goes on from the newest checkpoint in the recipe's output folder, if there is
            one; "never" refuses a folder that holds a run.

    Raises:
        DivergedError: after MAX_NON_FINITE_STEPS steps in a row without a finite loss and gradient.
        CheckpointError: when the output folder holds something that cannot be gone on from.
        DataError, RecipeError: when data or recipe cannot work.
    """
    run = prepare_run(recipe, resume)
    try:
        steps, perplexity, stopped = _loop(run, stop)
        if stopped is None:
            folder = save_model(run)
            run.reporter.event("finished", steps, f"model written to {folder}")
    finally:
        run.reporter.close()
    return TrainResult(run.folder, steps, perplexity, stopped)


def _loop(run: Run, stop: Stop | None) -> tuple[int, float, str | None]:
    """Optimizer steps from `run.first_step` on.

    Returns:
        Steps done, the last validation perplexity, and why `stop` ended the run, if it did.
    """
    settings, total_steps = run.recipe.training, run.recipe.num_steps
    processes = run.accelerator.num_processes
    micro_steps = settings.global_batch_size // settings.micro_batch_size // processes
    microbatches = iter(run.loader(run.first_step, total_steps - run.first_step))
    throughput = run.throughput()
    perplexity, non_finite = None, 0
    with run.watch() as watcher:
        for step in range(run.first_step, total_steps):
            done, factor = step + 1, run.learning_rate_factor(step)
            optim.set_learning_rate(run.optimizer, factor)
            loss, z_loss = _accumulate(run, microbatches, micro_steps)
            watcher.gradients()
            norm = parallel.clip_gradients(run.model, run.recipe.optimizer.max_grad_norm)
            loss, z_loss, norm = (value.item() for value in (loss, z_loss, norm))
            if math.isfinite(loss) and math.isfinite(norm):
                run.optimizer.step()
                non_finite = 0
            else:
                non_finite += 1
                _refuse(run, done, loss, norm, non_finite)
            if (telemetry := watcher.end_step()) is not None:
                run.reporter.telemetry(done, telemetry)
            run.optimizer.zero_grad(set_to_none=True)
            throughput.step()
            if done % settings.log_every == 0 or done == total_steps:
                rate = run.recipe.optimizer.learning_rate * factor
                metrics = {"loss": loss, "z_loss": z_loss, "learning_rate": rate, "grad_norm": norm}
                run.reporter.train(done, {**metrics, **throughput.read()})
            reason = None if stop is None else stop(done, loss, norm)
            if reason is not None:
                run.reporter.event("stopped", done, f"stopped: {reason}")
                return done, _validate(run, done), reason
            if _is_due(done, settings.evaluate_every, total_steps):
                perplexity = _validate(run, done)
                throughput.restart()
            if _is_due(done, settings.checkpoint_every, total_steps):
                _checkpoint(run, done)
                throughput.restart()
    perplexity = _validate(run, total_steps) if perplexity is None else perplexity
    return total_steps, perplexity, None


def _is_due(done: int, every: int, total_steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return done == total_steps or (every > 0 and done % every == 0)


def _accumulate(
    run: Run, microbatches: Iterator[dict[str, torch.Tensor]], micro_steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of one global batch; returns its mean loss and z-loss over all processes, 0-d."""
    device, processes = run.accelerator.device, run.accelerator.num_processes
    batches = [next(microbatches) for _ in range(micro_steps)]
    targets = torch.stack([(batch["shift_labels"] >= 0).sum() for batch in batches]).sum()
    # Every target of the global batch weighs the same, however many its microbatch has. Processes
    # average their gradients, hence the division.
    items = parallel.all_sum(targets.to(device)) / processes
    losses = torch.zeros(2, device=device)
    for index, batch in enumerate(batches):
        inputs = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        with parallel.gradient_sync(run.model, last=index == micro_steps - 1):
            output = run.model(**inputs, num_items_in_batch=items, use_cache=False)
            output.loss.backward()
        losses += torch.stack((output.loss.detach(), output.z_loss))
    means = parallel.all_sum(losses) / processes
    return means[0], means[1]


def _refuse(run: Run, done: int, loss: float, norm: float, in_a_row: int) -> None:
    """Record a step whose update would have made weights non-finite; give up after many."""
    text = f"update refused: loss {loss}, gradient norm {norm}; the weights are as before"
    run.reporter.event("non_finite", done, text, loss=loss, grad_norm=norm)
    if in_a_row >= MAX_NON_FINITE_STEPS:
        text = f"no finite loss and gradient in {in_a_row} steps"
        run.reporter.event("diverged", done, text)
        raise DivergedError(
            f"{run.recipe.name}: {text}, up to {done}. "
            f"The records are in {run.folder}. Lower optimizer.learning_rate, lengthen "
            "schedule.warmup, or add a technique, such as model.preset=qk_norm."
        )


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


def _checkpoint(run: Run, done: int) -> None:
    keep = run.recipe.training.keep_checkpoints
    folder = save_checkpoint(run.folder, done, run.model, run.optimizer, run.accelerator, keep)
    run.reporter.event("checkpoint", done, f"checkpoint {folder}", folder=folder.name)
