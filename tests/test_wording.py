"""Laws of numbers in sentences."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_stable.wording import counted, significant


def test_one_is_singular_and_all_else_plural() -> None:
    assert [counted(number, "run") for number in (0, 1, 2, 1000)] == [
        *("0 runs", "1 run", "2 runs", "1,000 runs")
    ]
    assert counted(2, "batch", "batches") == "2 batches"


@given(st.floats(1e-3, 1e12))
def test_four_digits_say_the_value(value: float) -> None:
    text = significant(value)
    assert float(text.replace(",", "")) == pytest.approx(value, rel=5.01e-4)
    assert len(text) <= 9


def test_digits_before_the_point_are_kept_below_a_million() -> None:
    assert [significant(value) for value in (236.7959, 1.05234, 123456.7, 2.5e15)] == [
        *("236.8", "1.052", "123,457", "2.500e+15")
    ]
    assert (significant(0.0), significant(math.inf)) == ("0.0", "inf")
