"""The declared rule: it decides which runs diverged, collapsed, degraded, spiked, or should stop.

Neither Rybakov et al. 2024 ("checking validation loss") nor Wortsman et al. 2023 gives a rule. Two
kinds of runs are unstable. A diverged run has a number that is not finite, or a loss that rose and
stayed high. A collapsed run ends near the loss of a unigram table, and its loss may never have
risen; small models end this way far more often. Thresholds are part of every record, so a recorded
run can be judged again under others.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from hf_stable.errors import UserError

Collapse = Literal["middle", "bigram", "unigram-0.2"]
# Prefixes of the reasons that mean diverged rather than collapsed.
_DIVERGED = ("non-finite", "blow-up")
# Weight below which the moving average ignores older losses: 0.9 ** 200 is 7e-10.
_REACH = 1e-9


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the rule. Losses are in nats per token."""

    collapse: Collapse = "middle"
    """Validation loss from which a run counts as collapsed. "middle" is halfway between the
    cross-entropies of a unigram and a bigram table, "bigram" is that of the bigram table (as in
    Wortsman et al. 2023), and "unigram-0.2" is that of the unigram table minus 0.2."""
    decay: float = 0.9
    """Decay per step of the moving average of the training loss."""
    blow_up: float = 0.5
    """Rise of the average above its lowest so far, after warm-up, for a spike or a blow-up."""
    remaining: float = 0.25
    """Rise that remains at the end of the run for a blow-up; with less, it was a spike."""
    hopeless: float = 0.5
    """Distance of the average above the unigram's cross-entropy at which a run is hopeless."""
    hopeless_steps: int = 50
    """Number of consecutive steps at that distance."""
    hopeless_from: float = 0.4
    """Fraction of the run before which it is never hopeless."""

    def __post_init__(self) -> None:
        if self.collapse not in get_args(Collapse):
            raise UserError(
                f"thresholds: collapse is {self.collapse!r}; write one of "
                f"{', '.join(get_args(Collapse))}"
            )
        for name in ("decay", "hopeless_from"):
            if not 0 <= asdict(self)[name] < 1:
                raise UserError(f"thresholds: {name} is {asdict(self)[name]}; write 0 to below 1")
        for name in ("blow_up", "remaining", "hopeless", "hopeless_steps"):
            if not asdict(self)[name] > 0:
                raise UserError(f"thresholds: {name} is {asdict(self)[name]}; write more than 0")

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict for records."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Thresholds":
        """Build thresholds from a plan or a record; missing ones have their defaults.

        Raises:
            UserError: If a name is unknown or a value is invalid.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(
                f"thresholds: {', '.join(unknown)} unknown; the rule has {', '.join(sorted(known))}"
            )
        return cls(**values)

    @property
    def needs_bigram(self) -> bool:
        """True if collapse is measured by a bigram's cross-entropy.

        It must then be below that of a unigram.
        """
        return self.collapse != "unigram-0.2"

    def collapse_at(self, unigram: float, bigram: float) -> float:
        """Return the validation loss, in nats, from which a run counts as collapsed.

        Raises:
            UserError: If the bigram table is no better than the unigram table.
        """
        if not self.needs_bigram:
            return unigram - 0.2
        if not bigram < unigram:
            raise UserError(
                f"bigram_nats_per_token is {bigram:.4g} and unigram_nats_per_token {unigram:.4g}: "
                "the rule needs a bigram table that is better. Use more text or a smaller "
                "vocabulary, or set the plan's thresholds to {collapse: unigram-0.2}"
            )
        return bigram if self.collapse == "bigram" else (unigram + bigram) / 2


@dataclass(frozen=True)
class Verdict:
    """Verdict of the rule on a run.

    Args:
        diverged: True if a number was not finite, or the training loss rose and stayed high.
        degraded: True if the run neither diverged nor collapsed, and is no better than a bigram
            table.
        spiked: True if the training loss rose and came back, whatever else happened.
        collapsed: True if the run did not diverge, and its final loss is that of a run that learned
            little, or it was stopped as hopeless.
        reasons: One sentence for each criterion that was met, e.g. "collapse: ...".
    """

    diverged: bool
    degraded: bool
    spiked: bool
    collapsed: bool = False
    reasons: tuple[str, ...] = ()

    @property
    def stable(self) -> bool:
        """True if the run neither diverged nor collapsed."""
        return not (self.diverged or self.collapsed)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict for records."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Verdict":
        """Build a verdict from a record.

        Old records lack "collapsed" and call every unstable run diverged. Their reasons distinguish
        the two kinds.
        """
        reasons = tuple(str(each) for each in values.get("reasons") or ())
        diverged, collapsed = bool(values.get("diverged")), values.get("collapsed")
        if collapsed is None:
            rose = any(each.startswith(_DIVERGED) for each in reasons)
            diverged, collapsed = rose, diverged and not rose
        return cls(
            diverged=diverged,
            degraded=bool(values.get("degraded")),
            spiked=bool(values.get("spiked")),
            collapsed=bool(collapsed),
            reasons=reasons,
        )


def judge(
    train: Mapping[str, np.ndarray],
    validation_loss: float | None,
    unigram: float,
    bigram: float,
    warmup_steps: float,
    thresholds: Thresholds | None = None,
    *,
    stopped: bool = False,
) -> Verdict:
    """Judge a run by its curves, by the rule of this module.

    A run diverged for either reason:

    - "non-finite": a training loss, gradient norm or validation loss is not finite.
    - "blow-up": after warm-up, the moving average of the training loss rose by more than `blow_up`
      above its lowest so far, and ends more than `remaining` above its lowest.

    Of the other runs, a run collapsed for either reason:

    - "collapse": the validation loss is at least `Thresholds.collapse_at`.
    - "hopeless": the run was stopped as hopeless.

    Of the rest, a run is degraded if its validation loss is at least that of a bigram table.

    Args:
        train: Columns of the log lines: "step" (T,) from 1, "loss" (T,) in nats and optionally
            "grad_norm" (T,). NaN marks a number that was not finite.
        validation_loss: Loss of the final weights, nats per token; None only for a stopped run.
        unigram: Cross-entropy of a unigram table on the same text, nats per token.
        bigram: Cross-entropy of a bigram table on the same text, nats per token.
        warmup_steps: Number of steps during which a rise does not count.
        thresholds: Thresholds of the rule; None means the defaults.
        stopped: True if the run was stopped as hopeless. It stays so under other thresholds.

    Raises:
        UserError: If there are no log lines or no validation loss, or from
            `Thresholds.collapse_at`.
    """
    thresholds = thresholds or Thresholds()
    _require(train, validation_loss, stopped)
    loss = np.nan if validation_loss is None else float(validation_loss)
    rise, left = rise_and_rest(train, warmup_steps, thresholds.decay)
    blown, back = rise > thresholds.blow_up, left <= thresholds.remaining
    reasons = [*_non_finite(train, validation_loss)]
    if blown and not back:
        reasons.append(f"blow-up: smoothed loss rose by {rise:.2f}, ended {left:.2f} above lowest")
    diverged = bool(reasons)
    reasons += _collapse(loss, thresholds.collapse_at(unigram, bigram), thresholds.collapse)
    if stopped:
        reasons.append("hopeless: stopped early with a training loss far above a unigram table's")
    collapsed = bool(reasons) and not diverged
    degraded = not reasons and loss >= bigram
    if degraded:
        reasons.append(f"degraded: validation loss {loss:.3f}, a bigram table has {bigram:.3f}")
    if blown and back:
        reasons.append(f"spike: smoothed loss rose by {rise:.2f} and came back")
    return Verdict(diverged, degraded, blown and back, collapsed, tuple(reasons))


def is_hopeless(
    losses: np.ndarray, step: int, total: int, unigram: float, thresholds: Thresholds | None = None
) -> bool:
    """Return True if a run should be stopped now, as unstable.

    It should if a loss is not finite, or if the moving average was above unigram + `hopeless` for
    the last `hopeless_steps` steps, all after the fraction `hopeless_from` of the run.

    The rule also stops a run that would have recovered later. No run that we know of recovered
    after its loss was above a unigram's for so long, but this is not guaranteed. Records therefore
    hold "stopped" next to the verdict.

    Args:
        losses: (step,) training losses of all steps so far, nats; NaN for a refused update.
        step: Number of steps taken.
        total: Number of steps of the whole run.
        unigram: Cross-entropy of a unigram table, nats per token.
        thresholds: Thresholds of the rule; None means the defaults.
    """
    thresholds = thresholds or Thresholds()
    losses = np.asarray(losses, dtype=float)
    if not np.isfinite(losses).all():
        return True
    if step - thresholds.hopeless_steps < thresholds.hopeless_from * total:
        return False
    remembered = int(np.log(_REACH) / np.log(thresholds.decay)) if thresholds.decay else 0
    recent = losses[-(thresholds.hopeless_steps + remembered + 1) :]
    last = smoothed(np.arange(len(recent)), recent, thresholds.decay)[-thresholds.hopeless_steps :]
    return bool((last > unigram + thresholds.hopeless).all())


def smoothed(steps: np.ndarray, losses: np.ndarray, decay: float) -> np.ndarray:
    """Return the (T,) exponential moving average with a decay per step, from the first finite loss.

    A loss that is not finite does not change it. Log lines that are k steps apart decay k times.
    """
    smooth: list[float] = []
    value, seen = math.nan, 0.0
    # Python floats, because numpy functions take ten times as long for a single number.
    for step, loss in zip(steps.tolist(), losses.tolist(), strict=True):
        if math.isfinite(loss):
            weight = 1.0 if math.isnan(value) else 1 - decay ** (step - seen)
            value = loss if weight == 1.0 else value + weight * (loss - value)
            seen = step
        smooth.append(value)
    return np.array(smooth, dtype=float)


def rise_and_rest(
    train: Mapping[str, np.ndarray], warmup_steps: float, decay: float
) -> tuple[float, float]:
    """Return two numbers in nats about the moving average of the training loss.

    They are its largest rise above its lowest so far, after warm-up, and its final distance above
    its lowest of all.
    """
    steps = np.asarray(train["step"], dtype=float)
    smooth = smoothed(steps, np.asarray(train["loss"], dtype=float), decay)
    known = ~np.isnan(smooth)
    steps, smooth = steps[known], smooth[known]
    lowest = np.minimum.accumulate(smooth)
    rises = (smooth - lowest)[steps > warmup_steps]
    if not len(rises):
        return 0.0, 0.0
    return float(rises.max()), float(smooth[-1] - lowest[-1])


def _require(train: Mapping[str, np.ndarray], validation_loss: float | None, stopped: bool) -> None:
    if not len(train.get("step", ())) or "loss" not in train:
        raise UserError("the run has no log lines with a step and a loss: run it again")
    if validation_loss is None and not stopped:
        raise UserError("validation_loss is null in a run that was not stopped: run it again")


def _collapse(loss: float, limit: float, kind: str) -> Iterator[str]:
    if loss >= limit:
        yield f"collapse: validation loss {loss:.3f}, at or above {limit:.3f} ({kind})"


def _non_finite(train: Mapping[str, np.ndarray], validation_loss: float | None) -> Iterator[str]:
    steps = np.asarray(train["step"])
    for name, words in (("loss", "training loss"), ("grad_norm", "gradient norm")):
        bad = steps[~np.isfinite(train[name])] if name in train else steps[:0]
        if len(bad):
            yield f"non-finite: {words} at step {int(bad[0])}, in {len(bad)} log lines in all"
    if validation_loss is not None and not np.isfinite(validation_loss):
        yield "non-finite: validation loss"
