"""Laws of weighted sources: exact shares, evenly spread, found at any position in one step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_stable.data import DataOrder, MixtureOrder, apportion, data_loader, mixture
from hf_stable.errors import DataError
from tests.data.test_order import random_state, steps_of_all_ranks

WEIGHTS = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12)
PAPER = [70.0] + [15 / 53] * 53 + [15 / 37] * 37


@pytest.fixture(autouse=True)
def short_period(monkeypatch):
    """A period of 1,000, so that several of them are seen in little time."""
    monkeypatch.setattr(mixture, "PERIOD", 1000)
    mixture._pattern.cache_clear()
    yield
    mixture._pattern.cache_clear()


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50), total=st.integers(0, 10**7))
def test_parts_sum_up_and_are_within_one_of_their_exact_share(weights, total):
    parts = apportion(weights, total)
    exact = np.array(weights) / sum(weights) * total
    assert sum(parts) == total
    assert (np.abs(np.array(parts) - exact) < 1 + 1e-6).all()
    # Who has the larger remainder is served first.
    rounded_up = [e - p for e, p in zip(exact, parts, strict=True) if p > e]
    rounded_down = [e - p for e, p in zip(exact, parts, strict=True) if p < e]
    if rounded_up and rounded_down:
        assert min(rounded_up) + 1 >= max(rounded_down) - 1e-6


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=9), seed=st.integers(0, 2**64 - 1))
def test_every_prefix_is_less_than_one_block_off(counts, seed):
    sources, ranks = mixture._pattern(tuple(counts), seed)
    period = sum(counts)
    taken = np.cumsum(sources[:, None] == np.arange(len(counts)), axis=0)
    ahead = taken * period - np.arange(1, period + 1)[:, None] * np.array(counts)
    # Tijdeman's bound, which is sharp.
    assert np.abs(ahead).max() <= period * (1 - 1 / max(2 * len(counts) - 2, 1)) + 1e-9
    assert taken[-1].tolist() == counts
    assert ranks.tolist() == [taken[place, s] - 1 for place, s in enumerate(sources)]


def test_the_papers_ninety_one_sources_are_spread_at_the_real_period(monkeypatch):
    monkeypatch.setattr(mixture, "PERIOD", 10_000)
    order = MixtureOrder(1, [50] * 91, PAPER)
    sources = order.sources(np.arange(10_000))
    assert np.bincount(sources).tolist() == apportion(PAPER, 10_000)
    english = np.cumsum(sources == 0) - 0.7 * np.arange(1, 10_001)
    assert np.abs(english).max() < 1


@settings(max_examples=20, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**64 - 1), start=st.integers(0, 10**15))
def test_any_period_has_exactly_the_apportioned_blocks_of_each_source(weights, seed, start):
    order = MixtureOrder(seed, [7] * len(weights), weights)
    found = order.sources(start + np.arange(1000))
    assert np.bincount(found, minlength=len(weights)).tolist() == apportion(weights, 1000)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    sizes=st.lists(st.integers(1, 30), min_size=3, max_size=3),
    periods=st.integers(0, 10**9),
)
def test_a_source_gives_every_block_once_an_epoch_in_another_order_each_time(seed, sizes, periods):
    order = MixtureOrder(seed, sizes, [5.0, 3.0, 2.0])
    positions = periods * 1000 + np.arange(300)
    blocks, sources = order.blocks(positions), order.sources(positions)
    first = np.cumsum([0, *sizes])
    for source, size in enumerate(sizes):
        own = blocks[sources == source] - first[source]
        earlier = periods * order.counts[source]
        own = own[-earlier % size :]
        epochs = own[: len(own) // size * size].reshape(-1, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        if size > 8 and len(epochs) > 1:
            assert len(np.unique(epochs, axis=0)) > 1


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    weights=WEIGHTS,
    positions=st.lists(st.integers(0, 2**50), max_size=20),
)
def test_a_position_gives_the_same_block_alone_or_among_others(seed, weights, positions):
    sizes = [3 + 10 * i for i in range(len(weights))]
    order = MixtureOrder(seed, sizes, weights)
    together = order.blocks(np.array(positions, dtype=np.int64))
    assert [order.block(position) for position in positions] == together.tolist()
    assert all(0 <= block < sum(sizes) for block in together)


ranges = st.tuples(st.integers(0, 2500), st.integers(1, 900)).map(lambda r: (r[0], r[0] + r[1]))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), skipped=st.lists(ranges, max_size=4))
def test_skipping_leaves_out_exactly_the_ranges(seed, skipped):
    whole = MixtureOrder(seed, [400, 90, 230], [1.0, 2.0, 5.0])
    left_out = {position for start, stop in skipped for position in range(start, stop)}
    kept = np.array([position for position in range(3500) if position not in left_out])
    order = whole
    for start, stop in skipped:
        order = order.with_skipped(start, stop)
    at_once = MixtureOrder(seed, [400, 90, 230], [1.0, 2.0, 5.0], skipped)
    for found in (order, at_once):
        positions = np.arange(len(kept))
        assert found.absolute(positions).tolist() == kept.tolist()
        assert found.blocks(positions).tolist() == whole.blocks(kept).tolist()
        assert found.sources(positions).tolist() == whole.sources(kept).tolist()


def test_only_the_ratios_of_weights_count():
    positions = np.arange(4000)
    one = MixtureOrder(3, [50, 60], [1.0, 3.0]).blocks(positions)
    assert MixtureOrder(3, [50, 60], [0.25, 0.75]).blocks(positions).tolist() == one.tolist()
    assert MixtureOrder(4, [50, 60], [1.0, 3.0]).blocks(positions).tolist() != one.tolist()


def test_sources_of_equal_size_have_permutations_of_their_own():
    order = MixtureOrder(3, [50, 50], [1.0, 1.0])
    positions = np.arange(100)
    blocks, sources = order.blocks(positions), order.sources(positions)
    assert blocks[sources == 0].tolist() != (blocks[sources == 1] - 50).tolist()


def test_epochs_are_the_blocks_taken_over_the_blocks_there_are():
    order = MixtureOrder(3, [50, 7], [1.0, 3.0])
    for positions in (0, 1, 999, 1000, 12_345):
        taken = np.bincount(order.sources(np.arange(positions)), minlength=2)
        assert order.epochs(positions) == (taken / [50, 7]).tolist()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0], "2 sources have 1 weights"),
        ([1.0, 0.0], "above 0"),
        ([1.0, -1.0], "above 0"),
        ([1.0, float("nan")], "above 0"),
        ([1.0, float("inf")], "above 0"),
        ([1.0, 1e-6], "weight 1e-06 of source 1 is less than one block"),
    ],
)
def test_impossible_weights_are_refused(weights, words):
    with pytest.raises(DataError, match=words):
        MixtureOrder(0, [5, 5], weights)


def test_a_source_without_blocks_is_refused():
    with pytest.raises(DataError, match="num_blocks is 0"):
        MixtureOrder(0, [5, 0], [1.0, 1.0])


@pytest.mark.parametrize("start", [0, 7, 130])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 16), (2, 8), (4, 1), (16, 1)])
def test_a_step_is_the_same_blocks_for_every_world_size_and_start(world_size, micro, start):
    order = MixtureOrder(3, [50, 11, 7], [5.0, 3.0, 2.0], [(100, 130)])
    for step, blocks in steps_of_all_ranks(order, world_size, micro, start, start + 5).items():
        assert blocks == sorted(order.blocks(np.arange(step * 16, step * 16 + 16)).tolist())


class Numbers(torch.utils.data.Dataset):
    def __init__(self, first, length):
        self.first, self.length = first, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"input_ids": torch.tensor([self.first + index])}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_of_sources_one_after_another_gives_the_order(num_workers):
    order = MixtureOrder(9, [20, 30], [1.0, 2.0])
    sources = torch.utils.data.ConcatDataset([Numbers(0, 20), Numbers(20, 30)])
    sizes = {"global_batch_size": 8, "micro_batch_size": 4, "rank": 1, "world_size": 2}
    before = random_state()
    loader = data_loader(
        sources, order, start_step=2, num_steps=4, num_workers=num_workers, **sizes
    )
    found = [batch["input_ids"][:, 0].tolist() for batch in loader]
    assert random_state() == before
    expected = [order.blocks(np.arange(4) + step * 8 + 4).tolist() for step in range(2, 6)]
    assert found == expected


def test_one_weighted_source_is_read_like_any_other_order():
    order = MixtureOrder(5, [30], [2.0])
    assert sorted(order.blocks(np.arange(60, 90)).tolist()) == list(range(30))
    assert isinstance(order._orders[0], DataOrder)
