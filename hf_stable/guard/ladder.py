"""Reaction to an alarm: a ladder of actions, from skipping one update to giving the run up.

Skipping helps against a bad batch and costs little. A lower learning rate lets weights recover that
have already moved. A rollback that leaves out the data helps when that was not enough (PaLM: about
100 steps before the spike, 200 to 500 batches). Only a loss that stays high, or numbers that are
not finite, go beyond the second action.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hf_stable.guard.detector import Alarm, Detector, Observation
from hf_stable.guard.rollbacks import Rollback
from hf_stable.recipes import GuardRecipe

Action = Literal["accept", "skip", "rollback", "give_up"]

# After more consecutive refused updates, a run cannot recover by itself.
MAX_NON_FINITE_STEPS = 20
# An alarm after this many steps without one counts as new trouble.
_CALM_STEPS = 50
# A loss that has come back by this fraction since lowering began may continue to recover.
_RECOVERING = 0.5
_ADVICE = (
    "Lower optimizer.learning_rate, lengthen schedule.warmup, or add a technique, such as "
    "model.preset=qk_norm; `hf-stable diagnose` shows which layer grew first."
)


@dataclass(frozen=True)
class Decision:
    """Decision about one step.

    Args:
        step: Number of the step, from 1.
        action: "accept" makes the update. "skip" drops the gradient, although the step and its data
            count as done. "rollback" and "give_up" drop it and end this part of the run.
        learning_rate_factor: Factor on top of the schedule, for the update of this step.
        reason: A sentence; "" if nothing is wrong.
        rule: Rule of the alarm (see `Alarm`); None without an alarm, like the next four.
        signal: Signal of the alarm.
        value: Value of the alarm.
        usual: Usual level of the value.
        limit: Limit of the rule.
        onset: First step of the trouble.
        rollback_to: Return to the newest checkpoint of at most this step; 0 is the beginning.
        skip_first: First step whose data is left out.
        skip_last: Last step whose data is left out.
    """

    step: int
    action: Action
    learning_rate_factor: float = 1.0
    reason: str = ""
    rule: str | None = None
    signal: str | None = None
    value: float | None = None
    usual: float | None = None
    limit: float | None = None
    onset: int | None = None
    rollback_to: int | None = None
    skip_first: int | None = None
    skip_last: int | None = None

    @property
    def quiet(self) -> bool:
        """True if there is nothing to report: no alarm, and the schedule's learning rate."""
        return not self.reason and self.learning_rate_factor == 1.0

    def row(self) -> dict[str, Any]:
        """Return the fields for a row of metrics.jsonl, besides `event` and `step`."""
        return {
            key: value
            for key, value in asdict(self).items()
            if value is not None and key not in ("step", "reason")
        } | ({"reason": self.reason} if self.reason else {})


class Guard:
    """Judges every step exactly once, in order. Equal observations give equal decisions."""

    def __init__(self, settings: GuardRecipe) -> None:
        self._settings = settings
        self._detector = Detector(settings)
        self._rollbacks: tuple[Rollback, ...] = ()
        self._step = 0
        self._onset, self._last_alarm = 0, -_CALM_STEPS - 1
        self._non_finite_in_a_row, self._skips_in_a_row = 0, 0
        self._skips: list[int] = []
        self._lowered_at: int | None = None
        self._lowered_until, self._excess = 0, 0.0

    def judge(self, seen: Observation) -> Decision:
        """Decide on one step.

        Args:
            seen: Numbers of the step.

        Returns:
            Decision on its update.

        Raises:
            ValueError: If the step is not later than the previous one.
        """
        if seen.step <= self._step:
            raise ValueError(f"step {seen.step} was judged already: the last was {self._step}")
        self._step = seen.step
        alarm = self._detector.look(seen)
        if alarm is None:
            self._non_finite_in_a_row = self._skips_in_a_row = 0
            decision = Decision(seen.step, "accept", self._factor(seen.step))
        else:
            self._note(seen.step, alarm)
            refused = alarm.rule == "non_finite"
            decision = (self._refuse if refused else self._climb)(seen.step, alarm)
        self._detector.take(seen, alarm, decision.action == "accept")
        return decision

    @property
    def rollback_to(self) -> int | None:
        """Step that a rollback would return to while there is trouble, else None."""
        is_calm = self._step - self._last_alarm > _CALM_STEPS
        if is_calm or "rollback" not in self._settings.actions:
            return None
        return self._first_undone() - 1

    def after_rollback(self, rollbacks: Sequence[Rollback]) -> None:
        """Pass the rollbacks made since the loaded state; call it after every load.

        Args:
            rollbacks: All rollbacks of the run, as returned by `read_rollbacks`.
        """
        self._rollbacks = tuple(rollbacks)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, without rollbacks: rollbacks.json is authoritative."""
        return {
            "detector": self._detector.state_dict(),
            "step": self._step,
            "onset": self._onset,
            "last_alarm": self._last_alarm,
            "non_finite_in_a_row": self._non_finite_in_a_row,
            "skips_in_a_row": self._skips_in_a_row,
            "skips": list(self._skips),
            "lowered_at": self._lowered_at,
            "lowered_until": self._lowered_until,
            "excess": self._excess,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`; call `after_rollback` next."""
        self._detector.load_state_dict(state["detector"])
        self._step = state["step"]
        self._onset, self._last_alarm = state["onset"], state["last_alarm"]
        self._non_finite_in_a_row = state["non_finite_in_a_row"]
        self._skips_in_a_row, self._skips = state["skips_in_a_row"], list(state["skips"])
        self._lowered_at, self._lowered_until = state["lowered_at"], state["lowered_until"]
        self._excess = state["excess"]

    def _note(self, step: int, alarm: Alarm) -> None:
        if step - self._last_alarm > _CALM_STEPS:
            self._onset = alarm.onset
        self._last_alarm = step
        self._skips = [at for at in self._skips if at > step - self._settings.memory]
        self._non_finite_in_a_row *= alarm.rule == "non_finite"

    def _climb(self, step: int, alarm: Alarm) -> Decision:
        """Take the first remaining action."""
        if step < self._lowered_until:
            return self._decide(step, alarm, "accept", "training continues, to recover")
        if self._may_skip(alarm):
            return self._skip(step, alarm)
        if self._may_lower(step):
            return self._lower(step, alarm)
        if not alarm.sustained:
            return self._decide(step, alarm, "accept", "update made: the loss may come back")
        if self._detector.excess() < _RECOVERING * self._excess:
            return self._lower(step, alarm)
        return self._undo(step, alarm)

    def _refuse(self, step: int, alarm: Alarm) -> Decision:
        self._non_finite_in_a_row += 1
        # Weights that are not finite stay so, whatever is skipped.
        helps = alarm.signal != "update_norm"
        # Without actions, only consecutive steps are counted.
        few = self._non_finite_in_a_row < MAX_NON_FINITE_STEPS
        if helps and few and self._skips_are_left():
            return self._skip(step, alarm)
        return self._undo(step, alarm)

    def _may_skip(self, alarm: Alarm) -> bool:
        # A drift is in the weights, and the update that a norm reports was already made.
        helps = alarm.rule != "drift" and alarm.signal != "update_norm"
        within = self._skips_in_a_row < self._settings.max_skips
        return "skip" in self._settings.actions and helps and within and self._skips_are_left()

    def _skips_are_left(self) -> bool:
        return len(self._skips) < self._settings.max_skips_in_memory

    def _may_lower(self, step: int) -> bool:
        """Return True if training may continue in spite of alarms.

        The learning rate is lowered, or kept if neither lowering nor a rollback is allowed.
        """
        actions = self._settings.actions
        recent = self._lowered_at is not None and step - self._lowered_at < self._settings.memory
        return not recent and ("lower" in actions or "rollback" not in actions)

    def _skip(self, step: int, alarm: Alarm) -> Decision:
        self._skips_in_a_row += 1
        if self._settings.actions:
            self._skips.append(step)
        return self._decide(step, alarm, "skip", "update skipped; the weights are unchanged")

    def _lower(self, step: int, alarm: Alarm) -> Decision:
        if self._lowered_at is None or step >= self._lowered_at + self._settings.memory:
            self._lowered_at = step
        self._lowered_until = step + self._settings.lower_steps
        self._excess = self._detector.excess()
        what = f"learning rate times {self._factor(step):g}"
        if "lower" not in self._settings.actions:
            what = "updates made"
        text = f"{what} until step {self._lowered_until - 1}, to recover"
        return self._decide(step, alarm, "accept", text)

    def _undo(self, step: int, alarm: Alarm) -> Decision:
        settings, tried = self._settings, self._tried(self._onset)
        if "rollback" not in settings.actions or len(tried) >= settings.max_rollbacks:
            return self._decide(step, alarm, "give_up", f"giving up; {self._diagnosis(tried)}")
        first = self._first_undone()
        last = max(step, first + settings.skip_batches * 2 ** len(tried) - 1)
        text = (
            f"rollback {len(tried) + 1} of {settings.max_rollbacks} to step {first - 1} at the "
            f"latest, leaving out the data of steps {first} to {last}"
        )
        decision = self._decide(step, alarm, "rollback", text)
        places = {"rollback_to": first - 1, "skip_first": first, "skip_last": last}
        return Decision(**{**asdict(decision), **places})

    def _first_undone(self) -> int:
        return max(1, self._onset - self._settings.rollback_steps)

    def _tried(self, onset: int) -> list[Rollback]:
        """Return the recent rollbacks, beyond which the run has not trained far."""
        return [each for each in self._rollbacks if each.at_step > onset - self._settings.memory]

    def _factor(self, step: int) -> float:
        """Return the learning-rate factor: lowered, then returning linearly to 1."""
        if "lower" not in self._settings.actions:
            return 1.0
        ends = [] if self._lowered_at is None else [self._lowered_until]
        # Trouble that returns with other data does not come from the data alone.
        if self._rollbacks and len(self._tried(self._rollbacks[-1].at_step)) > 1:
            ends.append(self._rollbacks[-1].at_step + self._settings.lower_steps)
        lowest, length = self._settings.lower_factor, self._settings.lower_steps
        returned = min((step - max(ends) + 1) / length, 1.0) if ends else 1.0
        return lowest + (1 - lowest) * max(returned, 0.0)

    def _decide(self, step: int, alarm: Alarm, action: Action, what: str) -> Decision:
        return Decision(
            step=step,
            action=action,
            learning_rate_factor=self._factor(step),
            reason=f"{_describe(alarm)}: {what}",
            rule=alarm.rule,
            signal=alarm.signal,
            value=alarm.value,
            usual=alarm.usual,
            limit=alarm.limit,
            onset=self._onset,
        )

    def _diagnosis(self, tried: list[Rollback]) -> str:
        """Describe the actions tried, and give advice."""
        if not self._settings.actions:
            return f"no finite loss and gradient in {self._non_finite_in_a_row} steps. {_ADVICE}"
        steps = f"{len(self._skips)} updates skipped in the last {self._settings.memory} steps"
        lowered = f", learning rate lowered at step {self._lowered_at}"
        if self._lowered_at is None or "lower" not in self._settings.actions:
            lowered = ""
        places = ", ".join(f"{each.at_step} to {each.to_step}" for each in tried)
        back = f", rolled back from step {places}" if tried else ""
        advice = _ADVICE
        if not tried:
            advice += " Or add rollback to guard.actions, which leaves out the data at fault."
        return f"trouble since step {self._onset}; tried: {steps}{lowered}{back}. {advice}"


def replay(observations: Iterable[Observation], settings: GuardRecipe) -> list[Decision]:
    """Repeat the decisions of a run from its log alone.

    A step number that goes back is a rollback if the last decision was one, and otherwise a resume.
    A resumed guard has the state after the step before.

    Args:
        observations: Observations of the run, in the order of its log.
        settings: Guard section of the recipe.

    Returns:
        One decision for each observation.
    """
    guard = Guard(settings)
    course: list[Observation | tuple[Rollback, ...]] = []
    rollbacks: tuple[Rollback, ...] = ()
    decisions: list[Decision] = []
    for seen in observations:
        if decisions and seen.step <= decisions[-1].step:
            course = _until(course, seen.step)
            if decisions[-1].action == "rollback":
                rollbacks = (*rollbacks, _rollback(decisions[-1], seen.step - 1))
                course.append(rollbacks)
            guard = _again(course, settings)
        course.append(seen)
        decisions.append(guard.judge(seen))
    return decisions


def _until(
    course: list[Observation | tuple[Rollback, ...]], step: int
) -> list[Observation | tuple[Rollback, ...]]:
    """Return the part of a course before this step was first judged."""
    for index, each in enumerate(course):
        if isinstance(each, Observation) and each.step >= step:
            return course[:index]
    return course


def _again(course: list[Observation | tuple[Rollback, ...]], settings: GuardRecipe) -> Guard:
    guard = Guard(settings)
    for each in course:
        if isinstance(each, Observation):
            guard.judge(each)
        else:
            guard.after_rollback(each)
    return guard


def _rollback(decision: Decision, to_step: int) -> Rollback:
    # The positions of the samples do not matter to a guard.
    return Rollback(decision.step, to_step, (0, 1), decision.reason, 0)


def _describe(alarm: Alarm) -> str:
    name = alarm.signal.replace("_", " ")
    if alarm.usual is None or alarm.limit is None:
        return f"{name} is {alarm.value}"
    what = {"spike": "spikes at", "plateau": "stays at", "drift": "drifts away to"}[alarm.rule]
    return f"{name} {what} {alarm.value:.4g} (usual {alarm.usual:.4g}, limit {alarm.limit:.4g})"
