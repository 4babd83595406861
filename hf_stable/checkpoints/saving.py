"""Saving of checkpoints: synchronously, or in the background while training continues."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from .directory import begin, finish, folder_of, give_up, prune, sync_files
from .layouts import write_files
from .state import State, take_state
from .together import from_main, rank_of, together


@dataclass(frozen=True)
class Keep:
    """Rule for which checkpoints are kept.

    Args:
        last: Number of newest checkpoints to keep.
        every: Also keep every checkpoint whose step is a multiple of this; 0 keeps no others.
        interval: Steps between regular checkpoints. Only these count for `last`.
    """

    last: int = 2
    every: int = 0
    interval: int = 1


class CheckpointWriter:
    """Writes the checkpoints of a run. All processes create one, and call it together.

    Args:
        run: Folder of the run.
        accelerator: Accelerator of the run.
        keep: Rule for which checkpoints are kept.
        tokenizer: Written beside the weights, so that a checkpoint's model/ is complete.
        asynchronous: Copy the state to CPU memory and write it in the background, one checkpoint at
            a time. A failure there is raised by the next `save` or `wait`.
    """

    def __init__(
        self, run: Path, accelerator: Accelerator, keep: Keep, *,
        tokenizer: Any = None, asynchronous: bool = False,
    ) -> None:  # fmt: skip
        self._parent, self._accelerator = run / "checkpoints", accelerator
        self._keep, self._tokenizer = keep, tokenizer
        self._pending: Future[Path] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        # Training uses the default group at the same time; sharing it aborted processes.
        own = asynchronous and dist.is_initialized()
        self._group: Any = dist.new_group(backend="gloo") if own else None

    def save(
        self, step: int, model: Any, optimizer: torch.optim.Optimizer,
        scalars: dict[str, Any], *, held: int | None = None,
    ) -> Path:  # fmt: skip
        """Write the state after `step` optimizer steps; collective.

        Args:
            step: Number of optimizer steps done.
            model: Wrapped model.
            optimizer: Optimizer of the model.
            scalars: JSON-serializable values, returned by `load_newest`.
            held: The newest regular checkpoint up to this step is kept for a rollback.

        Returns:
            The checkpoint's folder. It has this name only once it is complete.

        Raises:
            CheckpointError: On all processes, if this checkpoint (or the previous one, in the
                background) could not be written. Earlier checkpoints stay untouched.
        """
        self.wait()
        state = take_state(model, optimizer, self._accelerator, scalars, self._tokenizer)
        if self._thread is None:
            return _write(self._parent, step, state, self._keep, held, self._group)
        staged = state.staged()
        self._pending = self._thread.submit(
            _write, self._parent, step, staged, self._keep, held, self._group
        )
        return folder_of(self._parent, step)

    def wait(self) -> None:
        """Wait until the background checkpoint is on disk; call it at the end of a run.

        Raises:
            CheckpointError: If it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Release thread and process group after pending work, without raising."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._thread = self._group = None


def save_checkpoint(
    run: Path, step: int, model: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator,
    scalars: dict[str, Any], keep: Keep, tokenizer: Any = None,
) -> Path:  # fmt: skip
    """Write one checkpoint synchronously; see `CheckpointWriter.save`."""
    writer = CheckpointWriter(run, accelerator, keep, tokenizer=tokenizer)
    return writer.save(step, model, optimizer, scalars)


def _write(
    parent: Path, step: int, state: State, keep: Keep, held: int | None,
    group: dist.ProcessGroup | None,
) -> Path:  # fmt: skip
    rank, folder = rank_of(group), folder_of(parent, step)
    what = f"{folder} could not be written, the checkpoints before it are untouched"
    temporary = from_main(lambda: begin(parent, step), what, group)
    if temporary is None:
        return folder
    try:
        parts = together(
            lambda: sync_files(temporary, write_files(temporary, step, state, group, rank)),
            what,
            group,
        )
        files = {name: about for part in parts for name, about in part.items()}
        from_main(lambda: finish(temporary, step, files), what, group)
    except BaseException:
        if rank == 0:
            give_up(temporary)
        raise
    from_main(
        lambda: prune(parent, keep.last, keep.every, keep.interval, held),
        "old checkpoints could not be deleted",
        group,
    )
    return folder
