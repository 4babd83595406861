"""Predict instability from a run's first steps, and fit logit growth with scale.

A run is unstable if it diverged or collapsed.
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

# References that telemetry has to beat: facts known from the plan, and the loss.
REFERENCES = ("learning_rate", "rate_and_bound", "loss")
FEATURES = ("max_logit", "entropy", "update_per_rate", "grad_norm", *REFERENCES)
# A small entropy is a bad sign; for all other features, a large number is.
_SMALL_IS_BAD = ("entropy",)
_SAMPLES = 2_000
# Breaks ties of equal learning rates without reordering different ones.
_TIE = 1e-9
# An exponent below this is rounding error of equal values.
_FLAT = 1e-9


@dataclass(frozen=True)
class Predictor:
    """One feature at one time.

    Args:
        feature: Name of the feature.
        auc: Probability that a run that ends unstable has a worse number than one that does not,
            with its interval. Ties count half; 0.5 means no prediction.
        runs: Number of runs with a number.
        unstable: Number of these runs that end unstable.
    """

    feature: str
    auc: Interval
    runs: int
    unstable: int


def features_at(
    history: History, fraction: float, total_steps: int, peak_rate: float
) -> dict[str, float]:
    """Return a run's features after a fraction of its steps, from the last sample until then.

    A feature without a sample is NaN.

    - "max_logit": largest attention logit over layers and heads (Wortsman et al. 2023, section 3.3,
      take the first block's at 2 % of a run).
    - "entropy": smallest mean attention entropy of a head, over log(keys) (Zhai et al. 2023).
    - "update_per_rate": largest L2 norm of a layer's update, divided by its learning rate.
    - "grad_norm": gradient norm before clipping.
    - "loss": smoothed training loss, nats.
    - "learning_rate": peak learning rate, known before the run.
    - "rate_and_bound": peak learning rate, raised slightly if nothing bounds the attention logits,
      also known before the run.

    Args:
        history: Records of the run.
        fraction: Fraction of `total_steps`, above 0 and at most 1.
        total_steps: Steps of the whole run, also if it was stopped earlier.
        peak_rate: Peak learning rate. Updates are divided by it if the log has no learning rate.
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
    """Return True if a run's attention logits are bounded, by its record.

    Norms of queries and keys, a cap, sigma-Reparam and QK-clip bound them.
    """
    config = run.get("model_config", {})
    bounds = ("qk_norm", "attn_logit_softcapping", "sigma_reparam")
    optimizer = run.get("recipe", {}).get("optimizer", {})
    return any(config.get(name) for name in bounds) or bool(optimizer.get("qk_clip"))


def foretell(
    features: Sequence[Mapping[str, float]], unstable: Sequence[bool] | np.ndarray
) -> list[Predictor]:
    """Return the AUC of every feature over runs, the references last.

    A run without a number is left out of that feature. The AUC is NaN unless a feature has both
    stable and unstable runs. The bootstrap over runs ignores that runs of one method are similar,
    so intervals hold only for these methods and learning rates.

    Args:
        features: Features of each run, from `features_at`.
        unstable: (runs,) bool, True for an unstable run.
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
    """Return the area under the ROC curve: the Mann-Whitney U over the number of pairs.

    It is NaN unless there are both kinds of runs. Scores may be infinite but not NaN.
    """
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
    """Return `auc` with its bootstrap interval.

    Unstable and stable runs are resampled separately, so a resample has both kinds. A perfect AUC
    has an interval of width 0, which holds only for these runs.
    """
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
    """Return (unstable, stable): 1 where the unstable run has the larger score, 0.5 for a tie."""
    bad, good = scores[unstable][:, None], scores[~unstable][None, :]
    return (bad > good) + 0.5 * (bad == good)


@dataclass(frozen=True)
class PowerLaw:
    """Power law value = coefficient * size ** exponent.

    Args:
        coefficient: Value at size 1.
        exponent: Exponent with its interval (Student's t on the slope), NaN with only two points.
        residual: Standard deviation of log(value) around the law.
    """

    coefficient: float
    exponent: Interval
    residual: float

    def at(self, size: float) -> float:
        """Return the value of the law at a size."""
        return float(self.coefficient * size**self.exponent.value)

    def size_at(self, value: float) -> float:
        """Return the size at which the law reaches a value, such as logits of 1e4.

        It is inf unless the law grows by more than rounding error.
        """
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
    """Fit a power law by least squares in logarithms.

    It models the growth of a number, such as the largest attention logit at one learning rate, with
    width or parameters, to extrapolate to a larger model. In Wortsman et al. 2023, section 3.3, the
    logits predicted that a larger model would diverge.

    Args:
        sizes: (N,) above 0, at least two different ones.
        values: (N,) above 0, from stable runs only, because unstable runs follow no power law.
        confidence: Confidence of the interval of the exponent.

    Raises:
        UserError: If a number has no logarithm, or there is only one size.
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
    """Return the worst number over layers and heads, ignoring missing numbers."""
    return float(worse.reduce(sample[name], axis=None)) if name in sample else float("nan")


def _rate(history: History, step: int, peak_rate: float) -> float:
    """Return the learning rate at a step, interpolated between log lines."""
    rates = history.train.get("learning_rate")
    rate = peak_rate if rates is None else np.interp(step, history.train["step"], rates)
    return float(rate) if rate > 0 else float("nan")
