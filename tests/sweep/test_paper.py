"""Laws of answers: unresolved unless seeds or intervals separate; the paper meets its claims."""

import math

import pytest

from hf_stable.sweep import paper
from hf_stable.sweep.paper import Gap, Order

RATES = paper.TABLE_3_RATES


def seeds(*rates: float) -> dict[int, float]:
    return dict(enumerate(rates))


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (seeds(2, 2, 2), seeds(1, 1, 1), "above"),
        (seeds(2, 2, 1), seeds(1, 1, 1), "above"),
        (seeds(2, 1, 1), seeds(1, 1, 1), "open"),
        (seeds(2, 2, 1), seeds(1, 1, 2), "open"),
        (seeds(1, 1, 1), seeds(1, 1, 1), "equal"),
        (seeds(2, 2), seeds(1, 1), "open"),
        (seeds(2, 2, 2), {0: 1, 1: 1, 7: 1}, "open"),
        ({}, seeds(1, 1, 1), "open"),
    ],
)
def test_methods_are_in_order_where_seeds_say_so(
    one: dict[int, float], other: dict[int, float], found: Order
) -> None:
    assert paper.order(one, other) == found
    mirrored = {"above": "below", "below": "above"}.get(found, found)
    assert paper.order(other, one) == mirrored


def test_a_span_is_what_the_grid_allows() -> None:
    found = paper.span(seeds(2, 4, 4), seeds(1, 1, 2), [1, 2, 4, 8])
    assert found is not None
    assert (found.low, found.high) == (2, 4)
    # Breaks of 4 and 1 lie in 4 to 8 and 1 to 2; of 4 and 2 in 4 to 8 and 2 to 4.
    assert (found.span_low, found.span_high) == (1, 8)
    edge = paper.span(seeds(8), seeds(1), [1, 2, 4, 8])
    assert edge is not None and edge.span_high == math.inf
    assert paper.span(seeds(0), seeds(1), [1, 2]) is None
    assert paper.span({}, seeds(1), [1, 2]) is None


@pytest.mark.parametrize("method", sorted(set(paper.TABLE_3) - {"baseline"}))
def test_the_paper_with_three_equal_seeds_agrees_with_itself(method: str) -> None:
    own, base = ([paper.TABLE_3[name]] * 3 for name in (method, "baseline"))
    found = paper.span(seeds(*own), seeds(*base), RATES)
    assert paper.ratio_answer(found, paper.paper_span(method), 3) == "agree"
    assert paper.ratio_answer(found, paper.paper_span(method), 2) == "unresolved"
    breaks = {method: seeds(*own), "baseline": seeds(*base)}
    assert paper.above_baseline(breaks, method) == "agree"


def test_a_ratio_disagrees_only_where_spans_do_not_meet() -> None:
    theirs = paper.paper_span("qk_norm")
    assert (theirs.span_low, theirs.span_high) == pytest.approx((5, 10))
    equal = paper.span(seeds(1, 1, 1), seeds(1, 1, 1), [1, 3, 9])
    wide = paper.span(seeds(3, 3, 3), seeds(1, 1, 1), [1, 3, 9])
    assert paper.ratio_answer(equal, theirs, 3) == "disagree"
    assert paper.ratio_answer(wide, theirs, 3) == "unresolved"
    assert paper.ratio_answer(None, theirs, 3) == "unresolved"


def gap(value: float, *by_seed: float, p: float = 0.01, width: float = 0.005) -> Gap:
    return Gap(value, value - width, value + width, p, by_seed or (value, value, value))


@pytest.mark.parametrize(
    ("method", "found", "answer"),
    [
        ("qk_norm", gap(-0.03), "agree"),
        ("qk_norm", gap(0.03), "disagree"),
        ("qk_norm", gap(-0.03, p=0.06), "unresolved"),
        ("qk_norm", gap(-0.03, -0.03), "unresolved"),
        ("qk_norm", gap(-0.03, -0.07, 0.01), "unresolved"),
        ("qk_norm", None, "unresolved"),
        ("soft_cap", gap(0.004, p=0.5), "agree"),
        ("soft_cap", gap(0.03), "agree"),
        ("soft_cap", gap(-0.03), "disagree"),
        ("soft_cap", gap(-0.006, p=0.5), "unresolved"),
    ],
)
def test_perplexity_needs_seeds_and_documents(method: str, found: Gap | None, answer: str) -> None:
    assert paper.table_4_answer(method, found) == answer


def answers(breaks: dict[str, dict[int, float]], gaps: dict[str, Gap]) -> dict[str, str]:
    """By the claim's number and first name."""
    found = paper.criteria(breaks, RATES, gaps)
    return {" ".join(each.claim.split()[:2]): each.answer for each in found}


def test_the_papers_own_tables_meet_every_criterion() -> None:
    breaks = {name: seeds(rate, rate, rate) for name, rate in paper.TABLE_3.items()}
    base = paper.TABLE_4["baseline"]
    gaps = {name: gap(math.log(value / base)) for name, value in paper.TABLE_4.items()}
    found = answers(breaks, gaps)
    assert len(found) == 9 and set(found.values()) == {"agree"}


def test_nothing_measured_leaves_every_criterion_unresolved() -> None:
    assert set(answers({}, {}).values()) == {"unresolved"}
    same = {name: seeds(RATES[-1], RATES[-1], RATES[-1]) for name in paper.TABLE_3}
    # All stable to the end of the grid: nothing is known of any order.
    assert set(answers(same, {}).values()) == {"unresolved"}


def test_the_reverse_disagrees() -> None:
    turned = {name: seeds(*[48e-5 / rate] * 3) for name, rate in paper.TABLE_3.items()}
    grid = sorted({rate for each in turned.values() for rate in each.values()} | {1.0})
    found = {each.claim[:3]: each.answer for each in paper.criteria(turned, grid, {})}
    assert {found["(1)"], found["(2)"], found["(3)"], found["(5)"]} == {"disagree"}


def test_two_of_three_seeds_order_methods_but_do_not_separate_intervals() -> None:
    breaks = {"qk_norm": seeds(1, 1, 2), "qkv_norm": seeds(2, 2, 2)}
    (found,) = (c for c in paper.criteria(breaks, [1, 2, 4], {}) if c.claim.startswith("(5) qkv"))
    assert found.answer == "unresolved" and "do not separate" in found.ours
