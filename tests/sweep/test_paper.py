"""Laws of answers: unresolved unless seeds or intervals separate; the paper meets its claims."""

import math

import numpy as np
import pytest

from hf_stable.sweep import paper
from hf_stable.sweep.paper import Gap, Order, Span, Withheld

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
    # Breaks of 4 and 1 lie in 4 to 8 and 1 to 2; of 4 and 2 in 4 to 8 and 2 to 4.
    assert paper.span(seeds(2, 4, 4), seeds(1, 1, 2), [1, 2, 4, 8]) == Span(1, 8)
    assert paper.span({}, seeds(1), [1, 2]) is None


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (4, 1, "2 to 8"),
        (8, 1, "≥ 4"),  # stable to the grid's end, and the other breaks between 1 and 2
        (1, 8, "≤ 0.25"),
        (8, 8, "–"),
        (0, 1, "≤ 1"),  # below the lowest
        (4, 0, "≥ 4"),
        (0, 0, "–"),
    ],
)
def test_a_ratio_beyond_the_grid_is_a_bound(one: float, other: float, words: str) -> None:
    found = paper.span(seeds(one), seeds(other), [1, 2, 4, 8])
    assert found is not None and found.words == words


def test_a_break_drawn_within_its_step_has_its_ratio_in_the_span() -> None:
    rng, grid = np.random.default_rng(0), [1.0, 3.0, 9.0, 27.0]
    above = dict(zip([0.0, *grid], [*grid, 81.0], strict=True))
    for _ in range(200):
        one, other = (float(rng.choice([0.0, *grid])) for _ in range(2))
        true = [rng.uniform(each or 1e-3, above[each]) for each in (one, other)]
        found = paper.span(seeds(one), seeds(other), grid)
        assert found is not None and found.low <= true[0] / true[1] <= found.high


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
    assert (theirs.low, theirs.high) == pytest.approx((5, 10))
    equal = paper.span(seeds(1, 1, 1), seeds(1, 1, 1), [1, 3, 9])
    wide = paper.span(seeds(3, 3, 3), seeds(1, 1, 1), [1, 3, 9])
    assert paper.ratio_answer(equal, theirs, 3) == "disagree"
    assert paper.ratio_answer(wide, theirs, 3) == "unresolved"
    assert paper.ratio_answer(None, theirs, 3) == "unresolved"


def gap(value: float, width: float = 0.005, number: int = 3) -> Gap:
    return Gap(value, value - width, value + width, number)


@pytest.mark.parametrize(
    ("method", "found", "answer"),
    [
        ("qk_norm", gap(-0.03), "agree"),
        ("qk_norm", gap(0.03), "disagree"),
        ("qk_norm", gap(-0.03, width=0.04), "unresolved"),
        ("qk_norm", gap(-0.03, width=math.nan, number=1), "unresolved"),
        ("qk_norm", None, "unresolved"),
        ("soft_cap", gap(0.004), "agree"),
        ("soft_cap", gap(0.03), "agree"),
        ("soft_cap", gap(-0.03), "disagree"),
        ("soft_cap", gap(-0.006, width=0.01), "unresolved"),
    ],
)
def test_perplexity_needs_an_interval_over_seeds(
    method: str, found: Gap | None, answer: str
) -> None:
    assert paper.table_4_answer(method, found) == answer


def answers(breaks: dict[str, dict[int, float]], gaps: dict[str, Gap]) -> dict[str, str]:
    """By the claim's number and first name."""
    found = [*paper.table_3_claims(breaks, RATES), *paper.table_4_claims(gaps)]
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
    found = {each.claim[:3]: each.answer for each in paper.table_3_claims(turned, grid)}
    assert {found["(1)"], found["(2)"], found["(3)"], found["(5)"]} == {"disagree"}


def test_two_of_three_seeds_order_methods_but_do_not_separate_intervals() -> None:
    breaks = {"qk_norm": seeds(1, 1, 2), "qkv_norm": seeds(2, 2, 2)}
    claims = paper.table_3_claims(breaks, [1, 2, 4])
    (found,) = (each for each in claims if each.claim.startswith("(5) qkv"))
    assert found.answer == "unresolved" and "do not separate" in found.ours


@pytest.mark.parametrize(("next_rate", "answer"), [(0.1, "agree"), (0.12, "unresolved")])
def test_three_times_is_claimed_of_the_spans_low_end(next_rate: float, answer: str) -> None:
    """Stable at 0.3, while the baseline breaks between 0.03 and the next rate."""
    breaks = {"qk_norm": seeds(0.3, 0.3, 0.3), "baseline": seeds(0.03, 0.03, 0.03)}
    claims = paper.table_3_claims(breaks, [0.03, next_rate, 0.3])
    (found,) = (each for each in claims if each.claim.startswith("(3)"))
    assert found.answer == answer and found.ours == f"≥ {0.3 / next_rate:.3g} over seeds"


def test_what_is_withheld_is_no_answer() -> None:
    breaks = {name: seeds(rate, rate, rate) for name, rate in paper.TABLE_3.items()}
    idle = {"qk_norm_cap": Withheld("vacuous", "idle"), "soft_cap": Withheld("vacuous", "idle")}
    found = {each.claim: each.answer for each in paper.table_3_claims(breaks, RATES, idle)}
    assert [claim[:9] for claim, answer in found.items() if answer == "vacuous"] == [
        "(5) qk_no",
        "soft_cap ",
    ]
    # The chain and the first claim need all of their methods.
    unresolved = [claim[:3] for claim, answer in found.items() if answer == "unresolved"]
    assert unresolved == ["(1)", "(2)"]
    gaps = {name: gap(-0.03) for name in ("qk_norm", "qkv_norm", "qk_fc_norm")}
    gaps |= {"soft_cap": gap(0.01), "qkv_norm": gap(0.3)}
    assert paper.table_4_claims(gaps)[0].answer == "disagree"
    out = {"qkv_norm": Withheld("withdrawn", "geometry")}
    assert paper.table_4_claims(gaps, out)[0].answer == "unresolved"
