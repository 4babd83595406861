"""The paper's findings, claims about them, and the rules by which a study answers the claims.

The paper is Rybakov et al. 2024 (arXiv 2410.16682v1), Tables 3 and 4. Every answer is agree,
disagree or unresolved. It is unresolved unless seeds or intervals separate. An answer is withheld
if the comparison does not measure the method.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .study import BASELINE

Answer = Literal["agree", "disagree", "unresolved", "vacuous", "withdrawn"]
TableName = Literal["table_3", "table_4"]
Order = Literal["above", "below", "equal", "open"]
# Seed -> largest learning rate up to which every run is stable; 0 if none is.
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
# The paper's margin in nats: 0.1 of 11.19.
MARGIN = 0.1 / TABLE_4[BASELINE]
NORMS = ("qk_norm", "qkv_norm", "qk_norm_cap")
BELOW = ("qk_norm", "qkv_norm", "qk_fc_norm")
# Three is the smallest number of seeds in which two can outvote one.
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
    "Agree or disagree needs an interval over seeds (95 %, Student's t on the differences of "
    "paired seeds) on one side of 0, so at least two seeds. That soft_cap is not below the "
    f"baseline agrees where the interval lies above -{MARGIN:.4f} nats, the paper's margin of 0.1 "
    "perplexity."
)


@dataclass(frozen=True)
class Span:
    """Range that a grid allows for a ratio of breaks; a break is between two rates or beyond."""

    low: float
    high: float

    @property
    def words(self) -> str:
        """Text such as "1 to 10", "≥ 3" or "≤ 3.33"; a dash if nothing is known."""
        if not self.low > 0:
            return f"≤ {self.high:.3g}" if math.isfinite(self.high) else "–"
        return f"{self.low:.3g} to {self.high:.3g}" if self.high < math.inf else f"≥ {self.low:.3g}"


@dataclass(frozen=True)
class Gap:
    """Log-perplexity of a method minus that of the baseline, nats per token.

    Args:
        value: Mean over seeds.
        low: Lower end of the interval over seeds; NaN with one seed.
        high: Upper end of the interval over seeds; NaN with one seed.
        seeds: Number of seeds.
    """

    value: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Withheld:
    """Reason to withhold the answer for a method: "vacuous" or "withdrawn"."""

    answer: Answer
    reason: str


@dataclass(frozen=True)
class Criterion:
    """Answer to a claim on a table of the paper; `ours` describes the finding."""

    table: TableName
    claim: str
    ours: str
    answer: Answer


def order(one: Breaks, other: Breaks) -> Order:
    """Return the order of `one` relative to `other`, by ORDER_RULE."""
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


def span(one: Breaks, other: Breaks, rates: Sequence[float]) -> Span | None:
    """Return the ratio of two methods' breaks over their common seeds; None without a common seed.

    Args:
        one: Breaks of the method in the numerator.
        other: Breaks of the method in the denominator.
        rates: Learning rates of the study, ascending. Stability above the largest is unknown. A
            break of 0 is below the lowest.
    """
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return None
    above = dict(zip([0.0, *rates], [*rates, math.inf], strict=True))
    return Span(
        low=min(one[seed] / above[other[seed]] for seed in seeds),
        high=max(above[one[seed]] / other[seed] if other[seed] else math.inf for seed in seeds),
    )


def paper_span(method: str) -> Span:
    """Return the ratio in the paper's Table 3, method over baseline."""
    found = span({0: TABLE_3[method]}, {0: TABLE_3[BASELINE]}, TABLE_3_RATES)
    assert found is not None
    return found


def above_baseline(breaks: Mapping[str, Breaks], method: str) -> Answer:
    """Return the answer to "tolerates more than the baseline", as all methods do in the paper."""
    found = order(breaks.get(method, {}), breaks.get(BASELINE, {}))
    return _answer(found == "above", found == "below")


def ratio_answer(ours: Span | None, paper: Span, seeds: int) -> Answer:
    """Return the answer for two ratios, by RATIO_RULE; unresolved with too few seeds."""
    if ours is None or seeds < FEWEST_SEEDS:
        return "unresolved"
    close = 1e-9  # ratios of decimals
    inside = ours.low >= paper.low * (1 - close)
    inside &= ours.high <= paper.high * (1 + close)
    apart = ours.low >= paper.high * (1 - close)
    apart |= ours.high <= paper.low * (1 + close)
    return _answer(inside, apart)


def table_4_answer(method: str, gap: Gap | None) -> Answer:
    """Return the answer for a perplexity relative to the baseline's, by TABLE_4_RULE."""
    if gap is None or gap.seeds < 2:
        return "unresolved"
    below, above = gap.high < 0, gap.low > 0
    if TABLE_4[method] < TABLE_4[BASELINE]:
        return _answer(below, above)
    return _answer(gap.low > -MARGIN and not below, below)


def table_3_claims(
    breaks: Mapping[str, Breaks],
    rates: Sequence[float],
    withheld: Mapping[str, Withheld] | None = None,
) -> list[Criterion]:
    """Answer the claims on learning rates.

    Args:
        breaks: Breaks by method.
        rates: Learning rates of the study, ascending.
        withheld: Methods that cannot be compared, such as one whose cap never acted.
    """
    withheld = withheld or {}

    def between(one: str, other: str) -> Order:
        return order(breaks.get(one, {}), breaks.get(other, {}))

    edge = rates[-1] if rates else math.inf
    single = [
        *(_more_than_qk_norm(breaks, between, method) for method in ("qkv_norm", "qk_norm_cap")),
        _against(between("sigma_reparam", "qk_norm"), "below", "sigma_reparam", "(6) "),
        *(
            _against(_in_grid(breaks, between(method, "qk_norm"), method, edge), "equal", method, n)
            for method, n in (("qk_fc_norm", "(6) "), ("soft_cap", ""))
        ),
    ]
    methods = ("qkv_norm", "qk_norm_cap", "sigma_reparam", "qk_fc_norm", "soft_cap")
    return [
        _first(breaks, between, withheld),
        _chain(breaks, between, edge, withheld),
        _threefold(breaks, rates),
        *(
            replace(each, answer=withheld[method].answer) if method in withheld else each
            for method, each in zip(methods, single, strict=True)
        ),
    ]


def table_4_claims(
    gaps: Mapping[str, Gap], withheld: Mapping[str, Withheld] | None = None
) -> list[Criterion]:
    """Answer the claims on perplexity.

    Args:
        gaps: Difference to the baseline by method.
        withheld: Methods that cannot be compared.
    """
    return [_signs(gaps, withheld or {})]


def _answer(agree: bool, disagree: bool) -> Answer:
    return "agree" if agree else "disagree" if disagree else "unresolved"


def _all(answers: Sequence[Answer]) -> Answer:
    return _answer(all(each == "agree" for each in answers), "disagree" in answers)


def _first(
    breaks: Mapping[str, Breaks],
    between: Callable[[str, str], Order],
    withheld: Mapping[str, Withheld],
) -> Criterion:
    others = [method for method in TABLE_3 if method != BASELINE]
    found: dict[str, Order] = {method: between(method, BASELINE) for method in others}
    above = [method for method in others if found[method] == "above"]
    rest = [f"{method} {_alone(found[method])}" for method in others if found[method] != "above"]
    words = f"{len(above)} of {len(others)} above" + (f"; {', '.join(rest)}" if rest else "")
    words += _withheld_words(others, withheld)
    answers: list[Answer] = [
        withheld[method].answer if method in withheld else above_baseline(breaks, method)
        for method in others
    ]
    claim = "(1) baseline breaks at a strictly lower learning rate than every other method"
    return Criterion("table_3", claim, words, _all(answers))


def _withheld_words(methods: Sequence[str], withheld: Mapping[str, Withheld]) -> str:
    found = [f"{method} {withheld[method].answer}" for method in methods if method in withheld]
    return f"; {', '.join(found)}" if found else ""


def _in_grid(breaks: Mapping[str, Breaks], found: Order, method: str, edge: float) -> Order:
    """Return "open" for equality at an end of the grid: both methods may break beyond it."""
    ends = {0.0, edge} & set(breaks.get(method, {}).values())
    return "open" if found == "equal" and ends else found


def _chain(
    breaks: Mapping[str, Breaks],
    between: Callable[[str, str], Order],
    edge: float,
    withheld: Mapping[str, Withheld],
) -> Criterion:
    links = [("soft_temp", "soft_cap"), *(("soft_cap", norm) for norm in NORMS)]
    words: list[str] = []
    answers: list[Answer] = []
    for low, high in links:
        found = _in_grid(breaks, between(high, low), high, edge)
        out = [withheld[method] for method in (low, high) if method in withheld]
        answer = _answer(found in ("above", "equal"), found == "below")
        answers.append(out[0].answer if out else answer)
        words.append(f"{high} {_words(found)} {low}{f' ({out[0].answer})' if out else ''}")
    claim = f"(2) soft_temp ≤ soft_cap ≤ {', '.join(NORMS)} in the largest stable learning rate"
    return Criterion("table_3", claim, "; ".join(words), _all(answers))


def _threefold(breaks: Mapping[str, Breaks], rates: Sequence[float]) -> Criterion:
    ours, base = breaks.get("qk_norm", {}), breaks.get(BASELINE, {})
    claim = "(3) qk_norm tolerates at least 3 times the baseline's learning rate (paper: 6.7)"
    found = span(ours, base, rates)
    if found is None:
        return Criterion("table_3", claim, "no seed of both", "unresolved")
    enough = len(set(ours) & set(base)) >= FEWEST_SEEDS
    least = 3 * (1 - 1e-9)  # 0.3 / 0.1 is less than 3
    agree = enough and found.low >= least
    disagree = enough and found.high <= 3 * (1 + 1e-9)
    words = f"{found.words} over seeds"
    return Criterion("table_3", claim, words, _answer(agree, disagree))


def _signs(gaps: Mapping[str, Gap], withheld: Mapping[str, Withheld]) -> Criterion:
    claim = f"(4) perplexity of {', '.join(BELOW)} is below the baseline's, that of soft_cap is not"
    asked = (*BELOW, "soft_cap")
    words = [
        f"{method} {gaps[method].value:+.4f} nats" if method in gaps else f"{method} not recorded"
        for method in asked
    ]
    answers: list[Answer] = [
        withheld[each].answer if each in withheld else table_4_answer(each, gaps.get(each))
        for each in asked
    ]
    ours = "; ".join(words) + _withheld_words(asked, withheld)
    return Criterion("table_4", claim, ours, _all(answers))


def _more_than_qk_norm(
    breaks: Mapping[str, Breaks], between: Callable[[str, str], Order], method: str
) -> Criterion:
    found = between(method, "qk_norm")
    pairs = [breaks.get(name, {}) for name in (method, "qk_norm")]
    # Stricter than ORDER_RULE: the ranges of the seeds must not overlap.
    apart = bool(found in ("above", "below") and all(pairs))
    if apart:
        low, high = (pairs[1], pairs[0]) if found == "above" else (pairs[0], pairs[1])
        apart = max(low.values()) < min(high.values())
    claim = f"(5) {method} tolerates more than qk_norm (paper: 1.5 times), intervals separate"
    words = f"{_alone(found)}, seeds' intervals {'separate' if apart else 'do not separate'}"
    answer = _answer(apart and found == "above", apart and found == "below")
    return Criterion("table_3", claim, words, answer)


def _against(found: Order, paper: Literal["below", "equal"], method: str, number: str) -> Criterion:
    """Return the answer to a claim that other papers contradict."""
    claim = f"{number}{method} is {_words(paper)} qk_norm in the paper (others disagree)"
    against = {"below": ("above",), "equal": ("above", "below")}[paper]
    return Criterion("table_3", claim, _alone(found), _answer(found == paper, found in against))


def _words(found: Order) -> str:
    """Return the words to put between two names."""
    return {"open": "not separated from", "equal": "equal to"}.get(found, found)


def _alone(found: Order) -> str:
    return {"open": "not separated"}.get(found, found)
