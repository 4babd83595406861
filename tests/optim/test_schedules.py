"""What changes with the step."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_stable import optim

SCHEDULES = ["cosine", "linear", "constant", "wsd"]


@given(
    name=st.sampled_from(SCHEDULES),
    total=st.integers(2, 500),
    share=st.floats(0.0, 0.5),
    floor=st.floats(0.0, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_schedules_rise_then_fall_to_their_floor(name, total, share, floor) -> None:
    warmup = share * total
    factors = [
        optim.learning_rate_factor(
            step, name=name, total_steps=total, warmup=warmup, min_ratio=floor, decay_fraction=0.3
        )
        for step in range(total)
    ]
    peak = math.ceil(warmup) - 1 if warmup > 1 else 0
    assert all(0 < factor <= 1 for factor in factors[: peak + 1])
    assert all(a < b for a, b in itertools.pairwise(factors[: peak + 1]))
    assert all(a >= b for a, b in itertools.pairwise(factors[peak:]))
    if name == "constant":
        assert factors[-1] == 1
    else:
        assert all(factor >= floor - 1e-12 for factor in factors[peak:])
        if total * 0.7 < total - 2 and peak < total - 2:
            assert factors[-1] == pytest.approx(floor)


def test_fractional_warmup_is_not_rounded() -> None:
    """Rybakov et al.: 122,071 samples in batches of 512 are 238.4 steps."""
    warmup = 122_071 / 512
    factor = optim.learning_rate_factor(99, name="cosine", total_steps=1000, warmup=warmup)
    assert factor == pytest.approx(100 / warmup)
