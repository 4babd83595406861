"""Detection of a bad step: a number that is not finite, a spike, a plateau, or a slow drift.

A number is judged by its distance above the median of the accepted numbers before it. The unit is
the usual size of such distances. Only accepted, finite numbers that raised no alarm are remembered,
so neither a NaN nor a plateau can blind the rules. (The common rule, six standard deviations over
128 steps as in OLMo's SkipStepOptimizer, is blind for 129 steps after one NaN.)
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_stable.recipes import GuardRecipe

Signal = Literal["loss", "grad_norm", "update_norm"]
Rule = Literal["non_finite", "spike", "plateau", "drift"]

# Number of accepted values whose median is the level that the next value is compared with.
LEVEL_STEPS = 32
# A plateau is judged by the median of this many losses, so it is detected at the third of them.
PLATEAU_STEPS = 5
# The size of a normal number is below 2.24 deviations in 97.5 % of all cases, and below 1 / 1.4826
# in half. The larger of both estimates is used: heavy tails raise the first, a trend the second.
_TAIL, _TAIL_DEVIATIONS, _MEDIAN_DEVIATIONS = 0.975, 2.2414, 1.4826
# A smaller rise is harmless, however quiet the run: 0.02 nats of loss, a factor of 3 for a norm.
_SMALLEST_RISE = {"loss": 0.02, "grad_norm": math.log(3), "update_norm": math.log(3)}


@dataclass(frozen=True)
class Observation:
    """Numbers of a step before its update.

    Args:
        step: Number of the step, from 1, as in metrics.jsonl.
        loss: Mean training loss of the batch in nats per token.
        grad_norm: Global L2 norm of the gradient, before clipping.
        update_norm: L2 norm of the last update divided by its learning rate, which removes the
            effect of the schedule. None if the previous step made no update or none is measured.
    """

    step: int
    loss: float
    grad_norm: float
    update_norm: float | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Observation":
        """Build from a row of metrics.jsonl, in which non-finite numbers are written as names."""
        update = row.get("update_norm")
        return cls(
            int(row["step"]),
            float(row["loss"]),
            float(row["grad_norm"]),
            None if update is None else float(update),
        )

    @property
    def signals(self) -> dict[Signal, float]:
        """Measured numbers by name."""
        found: dict[Signal, float] = {"loss": self.loss, "grad_norm": self.grad_norm}
        return found if self.update_norm is None else {**found, "update_norm": self.update_norm}


@dataclass(frozen=True)
class Alarm:
    """A broken rule.

    Args:
        rule: Name of the rule.
        signal: Name of the number that broke it.
        value: The number itself.
        usual: Usual level of the number; None if it is not known or does not matter.
        limit: Limit of the rule, in the units of `value`; None like `usual`.
        onset: First step of the trouble.
    """

    rule: Rule
    signal: Signal
    value: float
    usual: float | None
    limit: float | None
    onset: int

    @property
    def sustained(self) -> bool:
        """True if the alarm is about a level, which skipping one batch cannot repair."""
        return self.rule in ("plateau", "drift")


def median(values: Sequence[float]) -> float:
    """Return the middle of the sorted values, or the mean of the two in the middle."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


class _Track:
    """Memory of one signal: its last accepted values, and the distance of each from its level.

    The level is a median, minus the amount by which such medians were recently too high. A fast
    falling loss leaves its plain median behind, and the distance would hide spikes. The level never
    follows a rise.
    """

    def __init__(self, window: int, smallest_rise: float) -> None:
        self._smallest_rise = smallest_rise
        self._values: deque[float] = deque(maxlen=LEVEL_STEPS)
        self._lags: deque[float] = deque(maxlen=LEVEL_STEPS)
        self._errors: deque[float] = deque(maxlen=window)
        self._enough = window // 4

    @property
    def ready(self) -> bool:
        """True if there are enough values to judge by."""
        return len(self._errors) >= self._enough

    def level(self) -> float | None:
        if len(self._lags) < LEVEL_STEPS:
            return None
        return median(self._values) + min(0.0, median(self._lags))

    def broken(self, value: float, deviations: float) -> tuple[float, float] | None:
        """Return level and limit if a value is too many deviations high, else None."""
        level = self.level()
        if level is None or not self.ready or value - level <= self._smallest_rise:
            return None
        sizes = sorted(abs(error) for error in self._errors)
        tail = sizes[int(_TAIL * len(sizes))] / _TAIL_DEVIATIONS
        limit = level + deviations * max(_MEDIAN_DEVIATIONS * median(sizes), tail)
        return (level, limit) if value > limit else None

    def take(self, value: float) -> None:
        level = self.level()
        if level is not None:
            self._errors.append(value - level)
        if len(self._values) == LEVEL_STEPS:
            self._lags.append(value - median(self._values))
        self._values.append(value)

    def state_dict(self) -> dict[str, list[float]]:
        return {
            "values": list(self._values),
            "lags": list(self._lags),
            "errors": list(self._errors),
        }

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        for name, memory in (
            ("values", self._values),
            ("lags", self._lags),
            ("errors", self._errors),
        ):
            memory.clear()
            memory.extend(state[name])


class Detector:
    """Examines every step, and remembers the accepted ones.

    Norms are judged by their logarithm. In the first 2 * LEVEL_STEPS + window / 4 steps, only
    numbers that are not finite raise an alarm.
    """

    def __init__(self, settings: GuardRecipe) -> None:
        self._settings = settings
        self._tracks: dict[Signal, _Track] = {
            signal: _Track(settings.window, _SMALLEST_RISE[signal])
            for signal in ("loss", "grad_norm", "update_norm")
        }
        self._recent: deque[float] = deque(maxlen=LEVEL_STEPS)  # finite losses, accepted or not
        self._best: float | None = None
        self._steps_above = 0

    def look(self, seen: Observation) -> Alarm | None:
        """Return the most severe rule that the step breaks, or None; call `take` afterwards."""
        if seen.update_norm is not None and not math.isfinite(seen.update_norm):
            # The most severe: the weights have not been finite since the previous step.
            return Alarm("non_finite", "update_norm", seen.update_norm, None, None, seen.step - 1)
        for signal, value in seen.signals.items():
            if not math.isfinite(value):
                return Alarm("non_finite", signal, value, None, None, seen.step)
        if not self._settings.actions:
            return None
        self._recent.append(seen.loss)
        self._count_above()
        return self._plateau(seen) or self._drift(seen) or self._spike(seen)

    def take(self, seen: Observation, alarm: Alarm | None, accepted: bool) -> None:
        """Remember a step: its norms if its update was accepted, its loss if no loss alarm either.

        Args:
            seen: Numbers of the step.
            alarm: Result of `look`.
            accepted: True if the update was made.
        """
        if not (accepted and self._settings.actions):
            return
        # The level of the norms may change for good, and is learned. The loss must not rise.
        if alarm is None or alarm.signal != "loss":
            self._tracks["loss"].take(seen.loss)
            level = self._tracks["loss"].level() if self._tracks["loss"].ready else None
            if level is not None and (self._best is None or level < self._best):
                self._best = level
        for signal, value in seen.signals.items():
            if signal != "loss" and value > 0:
                self._tracks[signal].take(math.log(value))

    def excess(self) -> float:
        """Return the rise of the loss above its best level in nats; 0 before there is a level."""
        if self._best is None:
            return 0.0
        return median(list(self._recent)[-PLATEAU_STEPS:]) - self._best

    def _count_above(self) -> None:
        if self._best is not None and len(self._recent) == LEVEL_STEPS:
            above = median(self._recent) > self._best + self._settings.drift_rise
            self._steps_above = self._steps_above + 1 if above else 0

    def _plateau(self, seen: Observation) -> Alarm | None:
        last = median(list(self._recent)[-PLATEAU_STEPS:])
        # The first losses after a plateau are lower, although the median is still high.
        lower = min(last, seen.loss)
        broken = self._tracks["loss"].broken(lower, self._settings.plateau)
        if broken is None:
            return None
        return Alarm("plateau", "loss", last, *broken, seen.step - PLATEAU_STEPS // 2)

    def _drift(self, seen: Observation) -> Alarm | None:
        if self._best is None or self._steps_above < self._settings.drift_steps:
            return None
        limit = self._best + self._settings.drift_rise
        if seen.loss <= limit:
            return None
        onset = max(1, seen.step - self._steps_above - LEVEL_STEPS // 2)
        return Alarm("drift", "loss", median(self._recent), self._best, limit, onset)

    def _spike(self, seen: Observation) -> Alarm | None:
        broken = self._tracks["loss"].broken(seen.loss, self._settings.spike)
        if broken is not None:
            return Alarm("spike", "loss", seen.loss, *broken, seen.step)
        for signal, value in seen.signals.items():
            if signal == "loss" or value <= 0:
                continue
            broken = self._tracks[signal].broken(math.log(value), self._settings.spike)
            if broken is not None:
                usual, limit = (math.exp(each) for each in broken)
                # The update measured in this step was made in the previous one.
                onset = seen.step - (signal == "update_norm")
                return Alarm("spike", signal, value, usual, limit, onset)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values; Python writes and reads its floats exactly."""
        return {
            "tracks": {signal: track.state_dict() for signal, track in self._tracks.items()},
            "recent": list(self._recent),
            "best": self._best,
            "steps_above": self._steps_above,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        for signal, track in self._tracks.items():
            track.load_state_dict(state["tracks"][signal])
        self._recent.clear()
        self._recent.extend(state["recent"])
        self._best, self._steps_above = state["best"], state["steps_above"]
