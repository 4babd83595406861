"""Workers of a study as Slurm jobs, through submitit (an extra)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_stable.errors import UserError

from .worker import work

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

# Number of times that Slurm may requeue a job at its time limit; preemption is not limited.
_RESTARTS = 100


class Work:
    """`work` as a job that Slurm may end at any moment and start again.

    A run with a result is not repeated.
    """

    def __call__(self, study: Path) -> None:
        from submitit.core.utils import UncompletedJobError  # noqa: PLC0415 (an extra)

        work(study, ended_by=(UncompletedJobError,))

    def checkpoint(self, study: Path) -> "DelayedSubmission":
        """Return the job for submitit to submit when Slurm ends this one: the same again."""
        from submitit.helpers import DelayedSubmission  # noqa: PLC0415 (an extra)

        return DelayedSubmission(self, study)


class Jobs:
    """Workers that continue after this process ends."""

    def __init__(self, study: Path, workers: int, parameters: dict[str, Any]) -> None:
        try:
            import submitit  # noqa: PLC0415 (an extra)
        except ImportError as error:
            raise UserError("Slurm needs submitit: pip install 'hf_stable[slurm]'") from error
        others = {key: value for key, value in parameters.items() if key != "cluster"}
        self._folder = study / "slurm"
        try:
            executor = submitit.AutoExecutor(
                folder=self._folder,
                cluster=parameters.get("cluster", "slurm"),
                slurm_max_num_timeout=_RESTARTS,
            )
            executor.update_parameters(name=study.name, **others)
        except (AssertionError, NameError, RuntimeError, ValueError) as error:
            raise UserError(f"--slurm: {error}") from error
        self._jobs = [executor.submit(Work(), study) for _ in range(workers)]

    def is_working(self) -> bool:
        """Return True while any job is pending or running."""
        return not all(job.done() for job in self._jobs)

    def end(self) -> None:
        """Do nothing: the jobs continue in Slurm."""

    def check(self) -> None:
        """Raise a UserError if jobs failed."""
        errors = [error for job in self._jobs if (error := job.exception()) is not None]
        if errors:
            last = " ".join(str(errors[-1]).split())[-400:]
            raise UserError(
                f"runs are left without a result, and {len(errors)} of {len(self._jobs)} jobs "
                f"failed; the last error is: {last} Logs are in {self._folder}; rerun the same "
                "command to resume."
            )
