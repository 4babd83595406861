"""The guard: judges every step before its update, and decides what to do about it.

Pure Python on three numbers per step. A decision is therefore the same on every rank, after a
resume, and in a replay of the log.
"""

from hf_stable.guard.detector import Alarm, Detector, Observation
from hf_stable.guard.ladder import MAX_NON_FINITE_STEPS, Action, Decision, Guard, replay
from hf_stable.guard.rollbacks import Rollback, append_rollback, read_rollbacks

__all__ = [
    "MAX_NON_FINITE_STEPS",
    "Action",
    "Alarm",
    "Decision",
    "Detector",
    "Guard",
    "Observation",
    "Rollback",
    "append_rollback",
    "read_rollbacks",
    "replay",
]
