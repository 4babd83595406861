"""The order is a permutation each epoch, the same for every world size, worker count and resume."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_stable.data import DataOrder, data_loader, microbatches
from hf_stable.errors import DataError

SEEDS = st.integers(0, 2**64 - 1)


@given(seed=SEEDS, num_blocks=st.integers(1, 300), epoch=st.integers(0, 10**9))
def test_each_epoch_takes_every_block_once(seed, num_blocks, epoch):
    positions = epoch * num_blocks + np.arange(num_blocks)
    assert sorted(DataOrder(seed, num_blocks).blocks(positions)) == list(range(num_blocks))


def test_a_large_epoch_is_a_permutation_without_pattern():
    size = 1_000_003
    blocks = DataOrder(5, size).blocks(np.arange(size))
    assert (np.bincount(blocks, minlength=size) == 1).all()
    # A random permutation has correlations of about 1/sqrt(size) = 0.001 with anything.
    places = np.arange(size)
    assert abs(np.corrcoef(places, blocks)[0, 1]) < 0.006
    assert abs(np.corrcoef(blocks[:-1], blocks[1:])[0, 1]) < 0.006
    other_epoch = DataOrder(5, size).blocks(size + places)
    other_seed = DataOrder(6, size).blocks(places)
    for other in (other_epoch, other_seed):
        assert abs(np.corrcoef(other, blocks)[0, 1]) < 0.006


@pytest.mark.parametrize("num_blocks", [2, 3, 5])
def test_small_permutations_all_occur_about_equally_often(num_blocks):
    order = DataOrder(0, num_blocks)
    epochs = 6000
    drawn = order.blocks(np.arange(epochs * num_blocks)).reshape(epochs, num_blocks)
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    expected = epochs / {2: 2, 3: 6, 5: 120}[num_blocks]
    assert len(counts) * expected == epochs
    # Six standard deviations of a binomial count.
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)


@given(seed=SEEDS, num_blocks=st.integers(1, 2**40), positions=st.lists(st.integers(0, 2**50)))
def test_a_position_gives_the_same_block_alone_or_among_others(seed, num_blocks, positions):
    order = DataOrder(seed, num_blocks)
    together = order.blocks(np.array(positions, dtype=np.int64))
    assert [order.block(position) for position in positions] == together.tolist()
    assert all(0 <= block < num_blocks for block in together)


ranges = st.tuples(st.integers(0, 80), st.integers(1, 30)).map(lambda r: (r[0], r[0] + r[1]))


@given(seed=SEEDS, skipped=st.lists(ranges, max_size=5))
def test_skipping_leaves_out_exactly_the_ranges(seed, skipped):
    whole = DataOrder(seed, 17)
    left_out = {position for start, stop in skipped for position in range(start, stop)}
    kept = [position for position in range(300) if position not in left_out]
    order = DataOrder(seed, 17, skipped)
    positions = np.arange(len(kept))
    assert order.absolute(positions).tolist() == kept
    assert order.blocks(positions).tolist() == whole.blocks(np.array(kept)).tolist()
    one_by_one = whole
    for start, stop in reversed(skipped):
        one_by_one = one_by_one.with_skipped(start, stop)
    assert one_by_one.skipped == order.skipped
    assert all(a[1] < b[0] for a, b in zip(order.skipped, order.skipped[1:], strict=False))


@pytest.mark.parametrize(
    "arguments",
    [(0, 0), (-1, 5), (2**64, 5), (0, 5, [(3, 3)]), (0, 5, [(4, 2)]), (0, 5, [(-1, 2)])],
)
def test_impossible_orders_are_refused(arguments):
    with pytest.raises(DataError):
        DataOrder(*arguments)


def test_a_negative_position_is_refused():
    with pytest.raises(DataError, match="-3"):
        DataOrder(0, 5).block(-3)


def steps_of_all_ranks(order, world_size, micro, start, stop):
    """{step: sorted positions' blocks} of the union over ranks, with the sizes checked."""
    steps = {step: [] for step in range(start, stop)}
    for rank in range(world_size):
        sizes = {"global_batch_size": 16, "micro_batch_size": micro, "world_size": world_size}
        batches = list(
            microbatches(order, start_step=start, num_steps=stop - start, rank=rank, **sizes)
        )
        assert all(len(batch) == micro for batch in batches)
        each = 16 // (micro * world_size)
        assert len(batches) == each * (stop - start)
        for i, batch in enumerate(batches):
            steps[start + i // each] += batch
    return {step: sorted(blocks) for step, blocks in steps.items()}


@pytest.mark.parametrize("start", [0, 1, 7, 19])
@pytest.mark.parametrize(
    ("world_size", "micro"), [(1, 16), (1, 4), (2, 8), (4, 1), (8, 2), (16, 1)]
)
def test_a_step_is_the_same_blocks_for_every_world_size_and_start(world_size, micro, start):
    order = DataOrder(3, 50, [(100, 130)])
    found = steps_of_all_ranks(order, world_size, micro, start, 20)
    for step, blocks in found.items():
        assert blocks == sorted(order.blocks(np.arange(step * 16, step * 16 + 16)).tolist())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"micro_batch_size": 3}, "multiple"),
        ({"micro_batch_size": 0}, "multiple"),
        ({"global_batch_size": 0}, "multiple"),
        ({"rank": 2}, "rank"),
        ({"rank": -1}, "rank"),
        ({"start_step": -1}, "start_step"),
    ],
)
def test_impossible_sizes_are_refused_before_the_first_batch(changed, words):
    sizes = {
        **{"start_step": 0, "num_steps": 1, "global_batch_size": 8, "micro_batch_size": 2},
        **{"rank": 0, "world_size": 2, **changed},
    }
    with pytest.raises(DataError, match=words):
        microbatches(DataOrder(0, 5), **sizes)
    with pytest.raises(DataError, match=words):
        data_loader(Numbers(), DataOrder(0, 5), **sizes)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"input_ids": torch.tensor([index, index + 1])}


def load(num_workers, start=2, num_steps=5):
    return data_loader(
        Numbers(),
        DataOrder(9, 40),
        start_step=start,
        num_steps=num_steps,
        global_batch_size=8,
        micro_batch_size=4,
        rank=1,
        world_size=2,
        num_workers=num_workers,
    )


def random_state():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_the_order_and_leaves_global_random_numbers_alone(num_workers):
    before = random_state()
    loader = load(num_workers)
    first = [batch["input_ids"][:, 0].tolist() for batch in loader]
    assert random_state() == before
    torch.rand(3)
    assert [batch["input_ids"][:, 0].tolist() for batch in loader] == first
    assert len(loader) == len(first) == 5
    order = DataOrder(9, 40)
    for i, blocks in enumerate(first):
        assert blocks == order.blocks(np.arange(4) + (2 + i) * 8 + 4).tolist()
    later = [batch["input_ids"][:, 0].tolist() for batch in load(num_workers, 5, 2)]
    assert later == first[3:]
