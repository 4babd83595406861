"""What the paper found, what we asked beforehand, and by which rule a study answers.

Rybakov et al. 2024 (arXiv 2410.16682v1), Tables 3 and 4; the criteria were fixed before any run.
Every answer is agree, disagree or unresolved, and unresolved unless seeds or intervals separate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .study import BASELINE

Answer = Literal["agree", "disagree", "unresolved"]
Order = Literal["above", "below", "equal", "open"]
# By seed, the largest learning rate up to which everything is stable; 0 where nothing is.
Breaks = Mapping[int, float]

# Learning rates of Table 3, and the largest that converged; one seed.
TABLE_3_RATES = (6e-3, 8e-3, 20e-3, 40e-3, 60e-3, 80e-3)
TABLE_3 = {
    "baseline": 6e-3,
    "soft_temp": 8e-3,
    "soft_clip": 8e-3,
    "sigma_reparam": 20e-3,
    "layer_scale": 20e-3,
    "soft_cap": 40e-3,
    "qk_norm": 40e-3,
    "qk_fc_norm": 40e-3,
    "qkv_norm": 60e-3,
    "qk_norm_cap": 60e-3,
}
# Perplexity at learning rate 3e-4 after 0.2T tokens, "+-0.1 with 95 %".
TABLE_4 = {
    "baseline": 11.19,
    "soft_cap": 11.24,
    "qkv_norm": 10.85,
    "qk_norm_cap": 11.00,
    "qk_norm": 10.84,
    "qk_fc_norm": 10.87,
}
# The paper's own margin, in nats: 0.1 of 11.19.
MARGIN = 0.1 / TABLE_4[BASELINE]
NORMS = ("qk_norm", "qkv_norm", "qk_norm_cap")
BELOW = ("qk_norm", "qkv_norm", "qk_fc_norm")
# Three seeds are the fewest of which two can outvote one.
FEWEST_SEEDS = 3
ORDER_RULE = (
    "Seeds are compared one by one, by the largest learning rate at which a seed's run and all at "
    "lower rates are stable. One method is above another where it is in at least two thirds of at "
    "least three seeds and below in none; it is equal where it is in all of them."
)
RATIO_RULE = (
    "A break lies between the largest stable learning rate and the next of the grid, so a ratio of "
    "two lies in a span, ours being the union over seeds. Agree: our span lies within the paper's; "
    "disagree: the two do not meet; unresolved: anything else, which is all that a coarse grid can "
    "say of a small ratio."
)
TABLE_4_RULE = (
    "Agree or disagree needs at least two seeds that all have the sign, and a Holm-corrected p "
    "below 0.05 over documents. That soft_cap is not below the baseline agrees where the interval "
    f"lies above -{MARGIN:.4f} nats, the paper's margin of 0.1 perplexity."
)


@dataclass(frozen=True)
class Spanned:
    """A ratio of two breaks over seeds: of the rates themselves, and what the grid allows."""

    low: float
    high: float
    span_low: float
    span_high: float


@dataclass(frozen=True)
class Gap:
    """Log-perplexity of a method less the baseline's, nats a token.

    Args:
        low, high: of its interval over documents.
        p: two-sided, after Holm's correction over the table.
        by_seed: the difference of each seed.
    """

    value: float
    low: float
    high: float
    p: float
    by_seed: Sequence[float]


@dataclass(frozen=True)
class Criterion:
    """An answer to something asked beforehand; `ours` is what was found, in words."""

    claim: str
    ours: str
    answer: Answer


def order(one: Breaks, other: Breaks) -> Order:
    """Whether `one` tolerates more than `other`, by ORDER_RULE."""
    seeds = sorted(set(one) & set(other))
    above = sum(one[seed] > other[seed] for seed in seeds)
    below = sum(one[seed] < other[seed] for seed in seeds)
    if len(seeds) < FEWEST_SEEDS:
        return "open"
    if not above and not below:
        return "equal"
    if above * below == 0 and 3 * (above + below) >= 2 * len(seeds):
        return "above" if above else "below"
    return "open"


def span(one: Breaks, other: Breaks, rates: Sequence[float]) -> Spanned | None:
    """The ratio of two methods' breaks; None without seeds in common, or where a break is 0.

    Args:
        rates: the study's learning rates, ascending. Above the largest nothing is known.
    """
    seeds = sorted(set(one) & set(other))
    if not seeds or any(not one[seed] or not other[seed] for seed in seeds):
        return None
    above = dict(zip(rates, [*rates[1:], math.inf], strict=True))
    return Spanned(
        low=min(one[seed] / other[seed] for seed in seeds),
        high=max(one[seed] / other[seed] for seed in seeds),
        span_low=min(one[seed] / above[other[seed]] for seed in seeds),
        span_high=max(above[one[seed]] / other[seed] for seed in seeds),
    )


def paper_span(method: str) -> Spanned:
    """The same of the paper's Table 3, method over baseline."""
    found = span({0: TABLE_3[method]}, {0: TABLE_3[BASELINE]}, TABLE_3_RATES)
    assert found is not None
    return found


def above_baseline(breaks: Mapping[str, Breaks], method: str) -> Answer:
    """Whether a method tolerates more than the baseline, as all do in the paper."""
    found = order(breaks.get(method, {}), breaks.get(BASELINE, {}))
    return _answer(found == "above", found == "below")


def ratio_answer(ours: Spanned | None, paper: Spanned, seeds: int) -> Answer:
    """Whether two spans agree, by RATIO_RULE; unresolved with too few seeds."""
    if ours is None or seeds < FEWEST_SEEDS:
        return "unresolved"
    close = 1e-9  # ratios of decimals
    inside = ours.span_low >= paper.span_low * (1 - close)
    inside &= ours.span_high <= paper.span_high * (1 + close)
    apart = ours.span_low >= paper.span_high * (1 - close)
    apart |= ours.span_high <= paper.span_low * (1 + close)
    return _answer(inside, apart)


def table_4_answer(method: str, gap: Gap | None) -> Answer:
    """Whether perplexity less the baseline's is as in the paper, by TABLE_4_RULE."""
    if gap is None or len(gap.by_seed) < 2:
        return "unresolved"
    shown = gap.p < 0.05
    below = shown and all(each < 0 for each in gap.by_seed)
    above = shown and all(each > 0 for each in gap.by_seed)
    if TABLE_4[method] < TABLE_4[BASELINE]:
        return _answer(below, above)
    return _answer(gap.low > -MARGIN and not below, below)


def criteria(
    breaks: Mapping[str, Breaks], rates: Sequence[float], gaps: Mapping[str, Gap]
) -> list[Criterion]:
    """Answers to what was asked beforehand.

    Args:
        breaks: by method. rates: the study's, ascending. gaps: by method, to the baseline.
    """

    def between(one: str, other: str) -> Order:
        return order(breaks.get(one, {}), breaks.get(other, {}))

    edge = rates[-1] if rates else math.inf
    return [
        _first(breaks, between),
        _chain(breaks, between, edge),
        _threefold(breaks, rates),
        _signs(gaps),
        *(_more_than_qk_norm(breaks, between, method) for method in ("qkv_norm", "qk_norm_cap")),
        _against(between("sigma_reparam", "qk_norm"), "below", "sigma_reparam", "(6) "),
        *(
            _against(_in_grid(breaks, between(method, "qk_norm"), method, edge), "equal", method, n)
            for method, n in (("qk_fc_norm", "(6) "), ("soft_cap", ""))
        ),
    ]


def _answer(agree: bool, disagree: bool) -> Answer:
    return "agree" if agree else "disagree" if disagree else "unresolved"


def _all(answers: Sequence[Answer]) -> Answer:
    return _answer(all(each == "agree" for each in answers), "disagree" in answers)


def _first(breaks: Mapping[str, Breaks], between: Callable[[str, str], Order]) -> Criterion:
    others = [method for method in TABLE_3 if method != BASELINE]
    found: dict[str, Order] = {method: between(method, BASELINE) for method in others}
    above = [method for method in others if found[method] == "above"]
    rest = [f"{method} {_alone(found[method])}" for method in others if found[method] != "above"]
    words = f"{len(above)} of {len(others)} above" + (f"; {', '.join(rest)}" if rest else "")
    answers: list[Answer] = [above_baseline(breaks, method) for method in others]
    claim = "(1) baseline diverges at a strictly lower learning rate than every other method"
    return Criterion(claim, words, _all(answers))


def _in_grid(breaks: Mapping[str, Breaks], found: Order, method: str, edge: float) -> Order:
    """Equal at an end of the grid is not known to be equal: both may break beyond it."""
    ends = {0.0, edge} & set(breaks.get(method, {}).values())
    return "open" if found == "equal" and ends else found


def _chain(
    breaks: Mapping[str, Breaks], between: Callable[[str, str], Order], edge: float
) -> Criterion:
    links = [("soft_temp", "soft_cap"), *(("soft_cap", norm) for norm in NORMS)]
    words: list[str] = []
    answers: list[Answer] = []
    for low, high in links:
        found = _in_grid(breaks, between(high, low), high, edge)
        answers.append(_answer(found in ("above", "equal"), found == "below"))
        words.append(f"{high} {_words(found)} {low}")
    claim = f"(2) soft_temp ≤ soft_cap ≤ {', '.join(NORMS)} in the largest stable learning rate"
    return Criterion(claim, "; ".join(words), _all(answers))


def _threefold(breaks: Mapping[str, Breaks], rates: Sequence[float]) -> Criterion:
    ours, base = breaks.get("qk_norm", {}), breaks.get(BASELINE, {})
    claim = "(3) qk_norm tolerates at least 3 times the baseline's learning rate (paper: 6.7)"
    found = span(ours, base, rates)
    if found is None:
        return Criterion(claim, "no ratio: a break is not on the grid", "unresolved")
    enough = len(set(ours) & set(base)) >= FEWEST_SEEDS
    least = 3 * (1 - 1e-9)  # 0.3 / 0.1 is less than 3
    agree = enough and found.low >= least
    disagree = enough and found.span_high <= 3 * (1 + 1e-9)
    words = " to ".join(dict.fromkeys(f"{each:.3g}" for each in (found.low, found.high)))
    return Criterion(claim, f"{words} over seeds", _answer(agree, disagree))


def _signs(gaps: Mapping[str, Gap]) -> Criterion:
    claim = f"(4) perplexity of {', '.join(BELOW)} is below the baseline's, that of soft_cap is not"
    asked = (*BELOW, "soft_cap")
    words = [
        f"{method} {gaps[method].value:+.4f} nats" if method in gaps else f"{method} not recorded"
        for method in asked
    ]
    answers: list[Answer] = [table_4_answer(each, gaps.get(each)) for each in asked]
    return Criterion(claim, "; ".join(words), _all(answers))


def _more_than_qk_norm(
    breaks: Mapping[str, Breaks], between: Callable[[str, str], Order], method: str
) -> Criterion:
    found = between(method, "qk_norm")
    pairs = [breaks.get(name, {}) for name in (method, "qk_norm")]
    # Its own rule: the seeds' intervals must separate, which two of three do not.
    apart = bool(found in ("above", "below") and all(pairs))
    if apart:
        low, high = (pairs[1], pairs[0]) if found == "above" else (pairs[0], pairs[1])
        apart = max(low.values()) < min(high.values())
    claim = f"(5) {method} tolerates more than qk_norm (paper: 1.5 times), intervals separate"
    words = f"{_alone(found)}, seeds' intervals {'separate' if apart else 'do not separate'}"
    return Criterion(claim, words, _answer(apart and found == "above", apart and found == "below"))


def _against(found: Order, paper: Literal["below", "equal"], method: str, number: str) -> Criterion:
    """Where others contradict the paper, so that a disagreement is expected."""
    claim = f"{number}{method} is {_words(paper)} qk_norm in the paper (others disagree)"
    against = {"below": ("above",), "equal": ("above", "below")}[paper]
    return Criterion(claim, _alone(found), _answer(found == paper, found in against))


def _words(found: Order) -> str:
    """Between two names."""
    return {"open": "not separated from", "equal": "equal to"}.get(found, found)


def _alone(found: Order) -> str:
    return {"open": "not separated"}.get(found, found)
