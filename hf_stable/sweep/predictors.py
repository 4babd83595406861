"""Predictors of instability from a run's first steps, and logit growth by scale.

Unstable is diverged or collapsed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from hf_stable.errors import UserError
from hf_stable.telemetry.reading.history import History

from .bootstrap import CONFIDENCE, Interval, interval
from .rule import Thresholds, smoothed

# What telemetry has to beat: what the plan says before anything is run, and a bad loss.
REFERENCES = ("learning_rate", "rate_and_bound", "loss")
FEATURES = ("max_logit", "entropy", "update_per_rate", "grad_norm", *REFERENCES)
# A small entropy is the bad sign; of all others, a large number.
_SMALL_IS_BAD = ("entropy",)
_SAMPLES = 2_000
# Breaks the tie of equal learning rates, and orders no two that differ.
_TIE = 1e-9
# An exponent below this is rounding of equal values.
_FLAT = 1e-9


@dataclass(frozen=True)
class Predictor:
    """One feature at one time.

    Args:
        auc: probability that a run that ends unstable has a worse number than one that does not,
            ties counting half; 0.5 is no sign at all. With its interval.
        runs, unstable: runs with a number, and those of them that end unstable.
    """

    feature: str
    auc: Interval
    runs: int
    unstable: int


def features_at(
    history: History, fraction: float, total_steps: int, peak_rate: float
) -> dict[str, float]:
    """What a run looked like after a part of it, by the last sample until then; NaN where there is
    none.

    "max_logit": the largest attention logit over layers and heads (Wortsman et al. 2023, section
    3.3, take the first block's at 2 % of a run). "entropy": the smallest mean attention entropy of
    a head, over log(keys) (Zhai et al. 2023). "update_per_rate": the largest L2 norm of a layer's
    update over its learning rate. "grad_norm": before clipping. "loss": the smoothed training
    loss, nats. "learning_rate": the peak. "rate_and_bound": the peak, and of equal ones those
    larger of which nothing bounds the attention logits; both are known before the run.

    Args:
        fraction: of `total_steps`, above 0, at most 1.
        total_steps: of the whole run, not until it was stopped.
        peak_rate: learning rate, by which updates are divided where the log lines have none.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction is {fraction}; write a part of the run, above 0 and at most 1")
    until = fraction * total_steps
    row = int(np.searchsorted(history.steps, until, side="right")) - 1
    line = int(np.searchsorted(history.train["step"], until, side="right")) - 1
    sample = {name: column[row] for name, column in history.telemetry.items()} if row >= 0 else {}
    rate = _rate(history, history.steps[row] if row >= 0 else 0, peak_rate)
    losses = smoothed(history.train["step"], history.train["loss"], Thresholds().decay)
    return {
        "max_logit": _extreme(sample, "layers.*.attention/max_logit", np.fmax),
        "entropy": _extreme(sample, "layers.*.attention/entropy", np.fmin),
        "update_per_rate": _extreme(sample, "layers.*.optimizer/update_l2", np.fmax) / rate,
        "grad_norm": float(history.train["grad_norm"][line]) if line >= 0 else np.nan,
        "loss": float(losses[line]) if line >= 0 else np.nan,
        "learning_rate": float(peak_rate),
        "rate_and_bound": float(peak_rate) * (1 + (0.0 if bounds_logits(history.run) else _TIE)),
    }


def bounds_logits(run: Mapping[str, Any]) -> bool:
    """Return whether something bounds a run's attention logits, by its record.

    It is a norm of queries and keys, a cap, sigma-Reparam or QK-clip.
    """
    config = run.get("model_config", {})
    bounds = ("qk_norm", "attn_logit_softcapping", "sigma_reparam")
    optimizer = run.get("recipe", {}).get("optimizer", {})
    return any(config.get(name) for name in bounds) or bool(optimizer.get("qk_clip"))


def foretell(
    features: Sequence[Mapping[str, float]], unstable: Sequence[bool] | np.ndarray
) -> list[Predictor]:
    """AUC of every feature over runs, the references last; a run without a number is left out of
    that feature, and a feature without both kinds of runs has AUC NaN.

    Runs of one method are alike, which the bootstrap over runs does not know: intervals are of
    these methods and learning rates, not of others.

    Args:
        features: of each run, as `features_at` gives them.
        unstable: (runs,) by the rule.
    """
    fates = np.asarray(unstable, dtype=bool)
    found = []
    for name in FEATURES:
        scores = np.array([run.get(name, np.nan) for run in features], dtype=float)
        known = ~np.isnan(scores)
        scores = -scores if name in _SMALL_IS_BAD else scores
        found.append(
            Predictor(
                feature=name,
                auc=auc_interval(scores[known], fates[known]),
                runs=int(known.sum()),
                unstable=int(fates[known].sum()),
            )
        )
    return found


def auc(scores: np.ndarray, unstable: np.ndarray) -> float:
    """Area under the ROC curve, the Mann-Whitney U over the number of pairs; NaN without both
    kinds. Scores may be infinite, not NaN."""
    scores, unstable = np.asarray(scores, dtype=float), np.asarray(unstable, dtype=bool)
    assert not np.isnan(scores).any()
    wins = _wins(scores, unstable)
    return float(wins.mean()) if wins.size else float("nan")


def auc_interval(
    scores: np.ndarray,
    unstable: np.ndarray,
    *,
    samples: int = _SAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """`auc` with its bootstrap interval; unstable and stable runs are resampled each among
    themselves, so that both kinds are always there. A perfect AUC has an interval of no width,
    which is of these runs only."""
    scores, unstable = np.asarray(scores, dtype=float), np.asarray(unstable, dtype=bool)
    value = auc(scores, unstable)
    if np.isnan(value):
        return interval(value, np.array([]))
    wins = _wins(scores, unstable)
    rng = np.random.default_rng(0)
    counts = [rng.multinomial(n, np.full(n, 1 / n), size=samples) for n in wins.shape]
    found = ((counts[0] @ wins) * counts[1]).sum(axis=1) / wins.size
    return interval(value, found, confidence)


def _wins(scores: np.ndarray, unstable: np.ndarray) -> np.ndarray:
    """(unstable, stable), 1 where the first has the larger score and 0.5 for a tie."""
    bad, good = scores[unstable][:, None], scores[~unstable][None, :]
    return (bad > good) + 0.5 * (bad == good)


@dataclass(frozen=True)
class PowerLaw:
    """value = coefficient * size ** exponent.

    Args:
        exponent: with its interval (Student's t on the slope), NaN with only two sizes.
        residual: standard deviation of log(value) about the law.
    """

    coefficient: float
    exponent: Interval
    residual: float

    def at(self, size: float) -> float:
        """The value that the law extrapolates to."""
        return float(self.coefficient * size**self.exponent.value)

    def size_at(self, value: float) -> float:
        """The size at which the law reaches a value, such as logits of 1e4; inf if never: it has to
        grow by more than rounding."""
        if self.exponent.value < _FLAT:
            return float("inf")
        with np.errstate(over="ignore"):
            return float(np.exp(np.log(value / self.coefficient) / self.exponent.value))


def fit_power_law(
    sizes: Sequence[float] | np.ndarray,
    values: Sequence[float] | np.ndarray,
    *,
    confidence: float = CONFIDENCE,
) -> PowerLaw:
    """Least squares in logarithms: how a number such as the largest attention logit, at one
    learning rate, grows with width or parameters, to be extrapolated to a larger model (after
    Wortsman et al. 2023, section 3.3: the logits foretold that a larger model would diverge).

    Args:
        sizes: (N,) above 0, at least two different ones.
        values: (N,) above 0, of stable runs: beyond the break logits are no law.

    Raises:
        UserError: for numbers without a logarithm, or a single size.
    """
    both = np.array([sizes, values], dtype=float)
    if not (np.isfinite(both).all() and (both > 0).all()):
        raise UserError("sizes and values of a power law have to be finite and above 0")
    size, value = np.log(both)
    if len(np.unique(size)) < 2:
        raise UserError(f"a power law needs at least two sizes, found {len(np.unique(size))}")
    centred = size - size.mean()
    slope = float(centred @ value / (centred @ centred))
    errors = value - value.mean() - slope * centred
    freedom = len(size) - 2
    if not freedom:
        exponent, residual = Interval(slope, float("nan"), float("nan")), 0.0
    else:
        residual = float(np.sqrt(errors @ errors / freedom))
        reach = stdtrit(freedom, (1 + confidence) / 2) * residual / np.sqrt(centred @ centred)
        exponent = Interval(slope, slope - float(reach), slope + float(reach))
    return PowerLaw(float(np.exp(value.mean() - slope * size.mean())), exponent, residual)


def _extreme(sample: Mapping[str, np.ndarray], name: str, worse: np.ufunc) -> float:
    """Over layers and heads that have a number."""
    return float(worse.reduce(sample[name], axis=None)) if name in sample else float("nan")


def _rate(history: History, step: int, peak_rate: float) -> float:
    """The learning rate of a step, between log lines."""
    rates = history.train.get("learning_rate")
    rate = peak_rate if rates is None else np.interp(step, history.train["step"], rates)
    return float(rate) if rate > 0 else float("nan")
