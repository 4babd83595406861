"""Collective actions that succeed on all processes or fail on all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from hf_stable.errors import CheckpointError

Result = TypeVar("Result")


def rank_of(group: dist.ProcessGroup | None = None) -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def count_of(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def words_of(error: BaseException) -> str:
    """Return the error's message; torch's own message is a traceback of all processes."""
    if isinstance(error, CheckpointException):
        error = next(cause for cause, _ in error.failures.values())
    return str(error) or type(error).__name__


def together(
    action: Callable[[], Result], what: str, group: dist.ProcessGroup | None = None
) -> list[Result]:
    """Run `action` on every process, and gather the results; collective.

    Args:
        action: Function to run.
        what: Description of the failure, for the error message.
        group: Process group; the default group unless given.

    Returns:
        Results of all processes, by rank.

    Raises:
        CheckpointError: On every process, if `action` raised on any of them.
    """
    mine: tuple[Any, str | None, Exception | None] = (None, None, None)
    try:
        mine = (action(), None, None)
    except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
        mine = (None, words_of(error), error if isinstance(error, Exception) else None)
    answers: list[Any] = [mine[:2]]
    if dist.is_initialized():
        answers = [None] * count_of(group)
        dist.all_gather_object(answers, mine[:2], group=group)
    problems = {text: rank for rank, (_, text) in reversed(list(enumerate(answers))) if text}
    if problems:
        where = "process {}: " if len(answers) > 1 else ""
        lines = [where.format(rank) + text for text, rank in reversed(list(problems.items()))]
        raise CheckpointError(f"{what}: {'; '.join(lines)}") from mine[2]
    return [result for result, _ in answers]


def from_main(action: Callable[[], Result], what: str, group: Any = None) -> Result:
    """Run `action` on the first process only, and return its result on all; collective."""
    main = rank_of(group) == 0
    return together(lambda: action() if main else None, what, group)[0]  # pyright: ignore
