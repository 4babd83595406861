"""What processes do together succeeds on all of them or fails on all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from hf_stable.errors import CheckpointError

Result = TypeVar("Result")


def rank_of(group: dist.ProcessGroup | None = None) -> int:
    """0 where there is one process."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def count_of(group: dist.ProcessGroup | None = None) -> int:
    """1 where there is one process."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def words_of(error: BaseException) -> str:
    """What went wrong, where torch's own message is a traceback of all processes."""
    if isinstance(error, CheckpointException):
        error = next(cause for cause, _ in error.failures.values())
    return str(error) or type(error).__name__


def together(
    action: Callable[[], Result], what: str, group: dist.ProcessGroup | None = None
) -> list[Result]:
    """Run `action` on every process, and gather what it returned; collective.

    Raises:
        CheckpointError: on every process, when it raised on one; `what` says what did not work.
    """
    mine: tuple[Any, str | None, Exception | None] = (None, None, None)
    try:
        mine = (action(), None, None)
    except (Exception, CheckpointException) as error:  # the second is no Exception
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
    """What `action` gives on the first process, which alone runs it; collective."""
    main = rank_of(group) == 0
    return together(lambda: action() if main else None, what, group)[0]  # pyright: ignore
