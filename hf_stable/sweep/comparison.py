"""Compare the perplexity of two checkpoints on the same documents, with paired intervals.

The bootstrap resamples documents. Its interval holds for these two checkpoints on similar text, not
for other seeds; `over_seeds` gives an interval for the method. Sums are (documents, 4) float64 in
the format of evaluation: NLL in nats, tokens, words, bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import ndtri, stdtrit

from hf_stable.errors import UserError

from .bootstrap import CONFIDENCE, SAMPLES, Interval, interval, resampled

Unit = Literal["token", "word", "byte"]
_COLUMNS: dict[Unit, int] = {"token": 1, "word": 2, "byte": 3}
# With fewer, resamples repeat single documents too often to estimate a spread. Evaluation uses the
# same number.
MIN_DOCUMENTS = 5


@dataclass(frozen=True)
class Comparison:
    """Difference A minus B; A is better if it is below 0.

    Args:
        log_perplexity: Difference in nats per unit.
        perplexity: Difference of the perplexities.
        perplexity_a: Perplexity of A.
        perplexity_b: Perplexity of B.
        p_value: Two-sided p-value of no difference, from the same resamples as the intervals.
        p_adjusted: Adjusted by `holm` over the methods of a table; equal to `p_value` otherwise.
        documents: Number of documents.
        unit: Unit of perplexity.
    """

    log_perplexity: Interval
    perplexity: Interval
    perplexity_a: float
    perplexity_b: float
    p_value: float
    p_adjusted: float
    documents: int
    unit: Unit


def paired_difference(
    sums_a: np.ndarray,
    sums_b: np.ndarray,
    *,
    unit: Unit = "token",
    confidence: float = CONFIDENCE,
    samples: int = SAMPLES,
) -> Comparison:
    """Return the difference of two checkpoints with a paired bootstrap over documents.

    The intervals are percentiles (Efron and Tibshirani 1993, chapter 13). Each resample takes the
    same documents for both checkpoints. Perplexity is exp(sum of NLL / sum of units), so long
    documents weigh more. The p-value is twice the smaller share of resampled differences on one
    side of 0. With fewer than 20 documents, the intervals are too narrow.

    Args:
        sums_a: Sums of checkpoint A, (documents, 4).
        sums_b: Sums of checkpoint B for the same documents in the same order.
        unit: Unit of perplexity. Compare models with different tokenizers by word or byte.
        confidence: Confidence of the intervals.
        samples: Number of resamples.

    Raises:
        UserError: If the documents differ, are too few, or have a sum that is not finite.
    """
    nll, units = _aligned(sums_a, sums_b, unit)

    def logs(index: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return nll[index].sum(axis=1) / units[index].sum(axis=1)[:, None]

    found = resampled(logs, len(nll), samples)
    found = found[np.isfinite(found).all(axis=1)]
    log_a, log_b = (nll.sum(axis=0) / units.sum()).tolist()
    with np.errstate(over="ignore"):
        perplexities = np.exp(found)
    p_value = _two_sided(found[:, 0] - found[:, 1])
    return Comparison(
        log_perplexity=interval(log_a - log_b, found[:, 0] - found[:, 1], confidence),
        perplexity=interval(
            math.exp(log_a) - math.exp(log_b), perplexities[:, 0] - perplexities[:, 1], confidence
        ),
        perplexity_a=math.exp(log_a),
        perplexity_b=math.exp(log_b),
        p_value=p_value,
        p_adjusted=p_value,
        documents=len(nll),
        unit=unit,
    )


def compare(
    methods: Mapping[str, np.ndarray],
    reference: np.ndarray,
    *,
    unit: Unit = "token",
    confidence: float = CONFIDENCE,
    samples: int = SAMPLES,
) -> dict[str, Comparison]:
    """Return each method's `paired_difference` from a reference, with adjusted p-values.

    The p-values are adjusted for the number of methods. The intervals are not adjusted: each has
    the requested confidence separately.
    """
    found = {
        name: paired_difference(sums, reference, unit=unit, confidence=confidence, samples=samples)
        for name, sums in methods.items()
    }
    adjusted = holm([each.p_value for each in found.values()])
    return {
        name: replace(each, p_adjusted=float(p))
        for (name, each), p in zip(found.items(), adjusted, strict=True)
    }


def over_seeds(differences: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of the differences of paired seeds, with Student's t interval.

    The ends are NaN with one seed, because its spread is unknown.
    """
    values = np.asarray(differences, dtype=float)
    mean, number = float(values.mean()), len(values)
    if number < 2:
        return Interval(mean, math.nan, math.nan)
    reach = stdtrit(number - 1, (1 + confidence) / 2) * values.std(ddof=1) / math.sqrt(number)
    return Interval(mean, mean - float(reach), mean + float(reach))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return (M,) adjusted p-values (Holm 1979).

    If every method with an adjusted p-value of at most alpha is called different, the probability
    of any false call among the M is at most alpha.
    """
    p_values = np.asarray(p_values, dtype=float)
    assert ((p_values >= 0) & (p_values <= 1)).all()
    order = np.argsort(p_values, kind="stable")
    stepped = p_values[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted


def needed_documents(
    sums_a: np.ndarray,
    sums_b: np.ndarray,
    *,
    wanted: float = 0.1,
    power: float = 0.8,
    confidence: float = CONFIDENCE,
    unit: Unit = "token",
) -> int | None:
    """Return the number of similar documents that a paired comparison needs.

    It is the number to detect a difference of `wanted` in perplexity with this power:
    (z(confidence) + z(power))^2 times the variance of a document's linearized part of the
    difference, divided by wanted^2. It is at least MIN_DOCUMENTS. None means that the two agree in
    every document, so the variance is unknown.

    Raises:
        UserError: As in `paired_difference`, or if a requested number is out of range.
    """
    if not (wanted > 0 and 0 < power < 1 and 0 < confidence < 1):
        raise UserError(
            f"wanted {wanted}, power {power}, confidence {confidence}: write a difference above 0 "
            "and two probabilities between 0 and 1"
        )
    nll, units = _aligned(sums_a, sums_b, unit)
    logs = nll.sum(axis=0) / units.sum()
    parts = (nll - logs * units[:, None]) @ (np.exp(logs) * [1, -1]) / units.mean()
    variance = parts.var(ddof=1)
    if variance <= (1e-9 * np.exp(logs).max()) ** 2:
        return None
    quantiles = ndtri((1 + confidence) / 2) + ndtri(power)
    return max(MIN_DOCUMENTS, math.ceil(variance * (quantiles / wanted) ** 2))


def _two_sided(differences: np.ndarray) -> float:
    """Return the two-sided p-value; adding 1 to each count keeps it above 0."""
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(differences) + 1)))


def _aligned(sums_a: np.ndarray, sums_b: np.ndarray, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """Check the sums and return (documents, 2) NLL of both and (documents,) units."""
    if unit not in _COLUMNS:
        raise UserError(f"unit is {unit!r}; write one of {', '.join(_COLUMNS)}")
    sums = [np.asarray(each, dtype=float) for each in (sums_a, sums_b)]
    for each in sums:
        if each.ndim != 2 or each.shape[1] != 4 or len(each) < MIN_DOCUMENTS:
            raise UserError(
                f"document sums are {each.shape}; give (documents, 4) with at least "
                f"{MIN_DOCUMENTS} documents: evaluate on more text, or on the text in more pieces"
            )
        if not np.isfinite(each).all():
            raise UserError("document sums hold a number that is not finite: evaluate again")
    _require_same(sums, unit)
    units = sums[0][:, _COLUMNS[unit]]
    if not (units >= 0).all() or not units.sum() > 0:
        raise UserError(f"the documents have no {unit}s; compare by another unit")
    return np.stack([each[:, 0] for each in sums], axis=1), units


def _require_same(sums: list[np.ndarray], unit: Unit) -> None:
    if len(sums[0]) != len(sums[1]):
        raise UserError(
            f"{len(sums[0])} documents against {len(sums[1])}: evaluate both on the same text"
        )
    for name in dict.fromkeys(("byte", unit)):
        column = _COLUMNS[name]
        differ = np.flatnonzero(sums[0][:, column] != sums[1][:, column])
        if len(differ):
            raise UserError(
                f"document {differ[0]} has {sums[0][differ[0], column]:g} {name}s in one and "
                f"{sums[1][differ[0], column]:g} in the other: evaluate both on the same text, and "
                'models with different tokenizers with unit "word" or "byte"'
            )
