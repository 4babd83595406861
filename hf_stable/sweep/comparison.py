"""Perplexity of two checkpoints on the same documents: the difference, with paired intervals.

Documents are what is resampled: such an interval speaks of these two checkpoints on other text of
the kind, not of other seeds. `over_seeds` speaks of the method. Sums are (documents, 4) float64 as
evaluation leaves them: NLL in nats, tokens, words, bytes.
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
# With fewer, resamples repeat one document too often for a spread; as evaluation has it.
MIN_DOCUMENTS = 5


@dataclass(frozen=True)
class Comparison:
    """A minus B; below 0, A is better.

    Args:
        log_perplexity: difference in nats a unit.
        perplexity: difference of perplexities.
        perplexity_a, perplexity_b: of the two.
        p_value: two-sided, of no difference, from the same resamples as the intervals.
        p_adjusted: by `holm` over the table that it stands in; p_value outside of one.
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
    """Bootstrap over documents of the difference of two checkpoints (percentiles, Efron and
    Tibshirani 1993, chapter 13; each resample takes the same documents for both).

    Perplexity is exp(sum of NLL / sum of units): long documents weigh more, as in the perplexity
    itself. The p-value is twice the smaller part of resampled differences on one side of 0. With
    fewer than 20 documents such intervals are too narrow.

    Args:
        sums_a, sums_b: (documents, 4), of the same documents in the same order.
        unit: of perplexity; models with different tokenizers are compared by word or byte.

    Raises:
        UserError: when documents differ, are too few, or hold a sum that is not finite.
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
    """Each method's `paired_difference` from a reference, with p-values adjusted for their number.

    Intervals are not adjusted: each by itself has the confidence asked for.
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
    """Mean of the differences of paired seeds, with Student's t interval; its ends are NaN with one
    seed, of which no spread is known."""
    values = np.asarray(differences, dtype=float)
    mean, number = float(values.mean()), len(values)
    if number < 2:
        return Interval(mean, math.nan, math.nan)
    reach = stdtrit(number - 1, (1 + confidence) / 2) * values.std(ddof=1) / math.sqrt(number)
    return Interval(mean, mean - float(reach), mean + float(reach))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """(M,) adjusted p-values (Holm 1979): to call those up to alpha different is to call one of M
    wrongly different at most with probability alpha."""
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
    """Documents like these that a paired comparison needs to see a difference of `wanted` in
    perplexity with this power: (z(confidence) + z(power))^2 times the variance of a document's part
    of the difference, linearised, over wanted^2.

    At least MIN_DOCUMENTS; None where the two are alike in every document, so that there is no
    spread to plan with.

    Raises:
        UserError: as `paired_difference`, or when a number asked for makes no sense.
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
    """One is added to each count, so that no finite number of resamples makes it 0."""
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(differences) + 1)))


def _aligned(sums_a: np.ndarray, sums_b: np.ndarray, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """(documents, 2) NLL of both and (documents,) units, checked."""
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
