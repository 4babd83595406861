"""The declared rule: which runs diverged, collapsed, are degraded or spiked, and which to stop.

Neither Rybakov et al. 2024 ("checking validation loss") nor Wortsman et al. 2023 gives one. Two
kinds of runs are unstable. A diverged run has a number that is not finite, or a loss that rose and
stayed up. A collapsed run ends near a table of unigrams, and its loss may never have risen: small
models end this way far more often. Thresholds are part of every record, and a recorded run can be
judged again under others.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from hf_stable.errors import UserError

Collapse = Literal["middle", "bigram", "unigram-0.2"]
# How the reasons for which a run is diverged, and not collapsed, begin.
_DIVERGED = ("non-finite", "blow-up")
# The moving average has forgotten what is older: 0.9 ** 200 is 7e-10.
_REACH = 1e-9


@dataclass(frozen=True)
class Thresholds:
    """The rule's numbers. Losses are in nats a token."""

    collapse: Collapse = "middle"
    """Validation loss from which a run has collapsed: the middle of a unigram's and a bigram's
    cross-entropy (more than half of what a bigram table knows is lost), the bigram's itself (the
    mark of Wortsman et al. 2023), or the unigram's less 0.2."""
    decay: float = 0.9
    """Decay a step of the moving average of the training loss."""
    blow_up: float = 0.5
    """Rise of that average above its lowest so far, after warm-up, that is a spike or a blow-up."""
    remaining: float = 0.25
    """What is left of a blow-up at the end of the run; with less, it was a spike."""
    hopeless: float = 0.5
    """Distance of that average above the unigram's cross-entropy at which a run has no hope."""
    hopeless_steps: int = 50
    """For how many steps in a row."""
    hopeless_from: float = 0.4
    """After which part of the run."""

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
        """For records."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Thresholds":
        """From a plan or a record; what is left out has its default.

        Raises:
            UserError: for a name that the rule does not know, or a value that it cannot have.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(
                f"thresholds: {', '.join(unknown)} unknown; the rule has {', '.join(sorted(known))}"
            )
        return cls(**values)

    @property
    def needs_bigram(self) -> bool:
        """Whether collapse is measured by a bigram's cross-entropy, which then has to lie below a
        unigram's."""
        return self.collapse != "unigram-0.2"

    def collapse_at(self, unigram: float, bigram: float) -> float:
        """The validation loss, in nats, from which a run has collapsed.

        Raises:
            UserError: when the bigram table is no better than the unigram table.
        """
        if not self.needs_bigram:
            return unigram - 0.2
        if not bigram < unigram:
            raise UserError(
                f"bigram_nats_per_token is {bigram:.4g} and unigram_nats_per_token {unigram:.4g}: "
                "a bigram table that is no better marks nothing. Take more text or a smaller "
                "vocabulary, or set the plan's thresholds to {collapse: unigram-0.2}"
            )
        return bigram if self.collapse == "bigram" else (unigram + bigram) / 2


@dataclass(frozen=True)
class Verdict:
    """What the rule says of a run.

    Args:
        diverged: a number was not finite, or the training loss rose and stayed up.
        collapsed: not diverged, and the final loss is that of a run that learned little, whether
            it had ever been lower or not; or the run was stopped as hopeless.
        degraded: neither, and no better than a bigram table.
        spiked: the training loss rose and came back, whatever else happened.
        reasons: a sentence for each criterion that was met, e.g. "collapse: ...".
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
        """For records."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Verdict":
        """From a record. One without "collapsed" is older and calls every unstable run diverged;
        its reasons tell the two kinds apart."""
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

    Diverged is any of: "non-finite", a training loss, gradient norm or validation loss that is no
    finite number; "blow-up", a moving average of the training loss that rose by more than `blow_up`
    above its lowest so far, after warm-up, and ends more than `remaining` above its lowest.
    Collapsed is, of all others: "collapse", a validation loss of at least `Thresholds.collapse_at`;
    "hopeless", a run that was stopped as such. Degraded is a validation loss from the bigram's on.

    Args:
        train: columns of the log lines: "step" (T,) from 1, "loss" (T,) nats and, if there,
            "grad_norm" (T,). NaN is a number that was not finite.
        validation_loss: of the final weights, nats a token; None only for a run that was stopped.
        unigram: cross-entropy of a unigram table on the same text, nats a token.
        bigram: the same of a bigram table.
        warmup_steps: after which a rise counts.
        thresholds: the rule's numbers; None is the defaults.
        stopped: whether the run was stopped as hopeless, which it stays under other thresholds.

    Raises:
        UserError: without log lines or a validation loss, or for `Thresholds.collapse_at`.
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
    """Return whether to stop a run now, as unstable.

    A loss is not finite, or the moving average has been above unigram + `hopeless` for the last
    `hopeless_steps` steps, all of them after the part `hopeless_from` of the run.

    A run that would have come back later is stopped all the same. Losses that have been above a
    unigram's for so long did not come back in any run that we know of, but the rule cannot promise
    it, which is why "stopped" is in the record beside the verdict.

    Args:
        losses: (step,) training losses of all steps so far, nats; a refused update's is NaN.
        step: steps done.
        total: steps of the whole run.
        unigram: cross-entropy of a unigram table, nats a token.
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
    """(T,) exponential moving average with this decay a step, beginning at the first finite loss.

    A loss that is not finite leaves it as it is, and log lines that are k steps apart decay k
    times.
    """
    smooth: list[float] = []
    value, seen = math.nan, 0.0
    # Numbers of Python's own: numpy's functions take ten times as long for a single one.
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
    """Largest rise after warm-up of the moving average above its lowest so far, and its end above
    its lowest of all; nats."""
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
