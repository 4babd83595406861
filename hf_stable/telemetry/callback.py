"""Telemetry for `transformers.Trainer`, with the same records as our training loop."""

import math
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_stable import records

from .names import pack, scalars
from .watching import Watcher, watch


class WatchCallback(TrainerCallback):
    """Watch a `Trainer`'s model and write `run.json` and `metrics.jsonl`, like our training loop.

        trainer.add_callback(WatchCallback(trainer, every=100))

    `hf-stable watch` and `hf-stable diagnose` read the folder. Gradients are measured when the
    optimizer steps, which is after the trainer's clipping.

    Args:
        trainer: If given, the numbers are also sent to its trackers (`report_to`).
        every: See `watch`.
        bounds_every: See `watch`.
        folder: Folder of the records; by default the trainer's output folder.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        every: int = 100,
        bounds_every: int = 1000,
        folder: Path | None = None,
    ) -> None:
        self._trainer = trainer
        self._every, self._bounds_every = every, bounds_every
        self._folder = folder
        self._watcher: Watcher | None = None
        self._record: records.RunRecord | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start watching."""
        model = kwargs["model"]
        self._watcher = watch(
            model,
            kwargs["optimizer"],
            every=self._every,
            bounds_every=self._bounds_every,
            first_step=state.global_step,
        )
        self._watcher.__enter__()
        if state.is_world_process_zero:
            folder = self._folder or Path(str(args.output_dir))
            self._record = records.RunRecord(folder)
            self._record.write_run(_describe(folder, model, state))
            event = "resumed" if state.global_step else "started"
            self._record.append(event, state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Record a sampled step."""
        numbers = None if self._watcher is None else self._watcher.end_step()
        if numbers is None:
            return
        if self._record is not None:
            self._record.append("telemetry", state.global_step, **pack(numbers))
        if self._trainer is not None:
            # Not with `trainer.log`, which would print the numbers and replace the log of the step.
            trackers = tuple(INTEGRATION_TO_CALLBACK.values())
            for callback in self._trainer.callback_handler.callbacks:
                if isinstance(callback, trackers):
                    callback.on_log(args, state, control, logs=scalars(numbers), **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record losses, learning rate and gradient norm."""
        if self._record is None or logs is None:
            return
        if "loss" in logs:
            names = ("loss", "grad_norm", "learning_rate")
            row = {name: float(logs[name]) for name in names if name in logs}
            self._record.append("train", state.global_step, **row)
        if "eval_loss" in logs:
            loss = float(logs["eval_loss"])
            # exp overflows beyond 709 nats.
            perplexity = math.inf if loss > 700 else math.exp(loss)
            self._record.append("validation", state.global_step, loss=loss, perplexity=perplexity)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop watching and restore the model."""
        if self._watcher is not None:
            self._watcher.__exit__(None, None, None)
        if self._record is not None:
            self._record.append("finished", state.global_step)
            self._record.close()
        self._watcher = self._record = None


def _describe(folder: Path, model: Any, state: TrainerState) -> dict[str, Any]:
    """Return the content of run.json for a run without a recipe."""
    return {
        "recipe": {"name": folder.name, "training": {"steps": state.max_steps}},
        "model_config": model.config.to_dict(),
        "parameters": model.num_parameters(),
        "versions": records.versions(),
    }
