"""Mix weighted sources: evenly spread and in exact proportion.

Weights are shares of blocks, and so of tokens. The length and number of documents do not matter.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from hf_stable.data.order import DataOrder, Order
from hf_stable.data.token_file import TokenFile
from hf_stable.errors import DataError

# Positions after which the order of the sources repeats: a share is exact to 0.005 %.
PERIOD = 10_000


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` into integers in proportion to the weights, by the largest remainder.

    The parts sum to `total`, and each differs from its exact share by less than one.

    Raises:
        DataError: If a weight is not a positive number.
    """
    values = np.asarray(weights, dtype=np.float64)
    if not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise DataError(f"weights are {list(weights)}, each must be a number above 0")
    # Scale by the largest first, because the sum of huge weights would overflow.
    values /= values.max()
    exact = values / values.sum() * total
    parts = np.floor(exact).astype(np.int64)
    order = np.argsort(parts - exact, kind="stable")
    parts[order[: total - int(parts.sum())]] += 1
    return parts.tolist()


@lru_cache(maxsize=8)
def _pattern(counts: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each position of a period and its earlier occurrences, (period,) int64.

    Tijdeman's rule (The chairman assignment problem, Discrete Mathematics 32, 1980): among the
    sources that lag enough, the next one is the one whose lag would be the first to become too
    large. In every prefix, each source is less than one block away from its exact share. The seed
    breaks ties.
    """
    share = np.array(counts, dtype=np.int64)
    period, slack = int(share.sum()), max(2 * len(counts) - 2, 1)
    ties = np.random.Generator(np.random.PCG64(seed)).permutation(len(counts))
    taken = np.zeros_like(share)
    sources, ranks = np.empty((2, period), dtype=np.int64)
    for place in range(period):
        lagging = slack * (share * (place + 1) - period * taken) >= period
        deadlines = np.where(lagging, (slack * (taken + 1) - 1) / share, np.inf)
        first = np.flatnonzero(deadlines == deadlines.min())
        chosen = first[np.argmin(ties[first])]
        sources[place], ranks[place] = chosen, taken[chosen]
        taken[chosen] += 1
    return sources, ranks


class MixtureOrder(Order):
    """An endless order of the blocks of several sources, in proportion to their weights.

    Any PERIOD consecutive absolute positions hold the same number of blocks of a source, given by
    `apportion`. In every prefix of a period, each source is less than one block away from its exact
    share. Each source has separate epochs and permutations: an exhausted source starts again, in
    another order. Block ids count through the sources one after another, as in
    `torch.utils.data.ConcatDataset`.

    Args:
        seed: See `Order`.
        num_blocks: Number of blocks of each source.
        weights: Positive weight of each source; only their ratios matter.
        skipped: See `Order`.

    Raises:
        DataError: If a source has no block, or a weight is too small for one block in a period.
    """

    def __init__(
        self,
        seed: int,
        num_blocks: Sequence[int],
        weights: Sequence[float],
        skipped: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(seed, skipped)
        if len(num_blocks) != len(weights):
            raise DataError(
                f"{len(num_blocks)} sources have {len(weights)} weights: give one for each source"
            )
        self.num_blocks = tuple(num_blocks)
        self.weights = tuple(weights)
        self.counts = tuple(apportion(weights, PERIOD))
        if 0 in self.counts:
            least = self.counts.index(0)
            raise DataError(
                f"weight {weights[least]} of source {least} is less than one block in {PERIOD}: "
                "raise it, or leave the source out"
            )
        self._orders = [
            DataOrder(_source_seed(seed, source), count) for source, count in enumerate(num_blocks)
        ]
        self._first = np.concatenate([[0], np.cumsum(num_blocks)])[:-1]

    def sources(self, positions: np.ndarray) -> np.ndarray:
        """Return the index of the source (int64) at positions of any shape."""
        return self._turn(self.absolute(positions))[0]

    def epochs(self, num_positions: int) -> list[float]:
        """Return how often each source is read in the first positions, with none skipped."""
        periods, rest = divmod(num_positions, PERIOD)
        some = np.bincount(_pattern(self.counts, self.seed)[0][:rest], minlength=len(self.counts))
        blocks = periods * np.array(self.counts) + some
        return (blocks / np.array(self.num_blocks)).tolist()

    def with_skipped(self, start: int, stop: int) -> "MixtureOrder":
        ranges = [*self.skipped, (start, stop)]
        return MixtureOrder(self.seed, self.num_blocks, self.weights, ranges)

    def _turn(self, absolute: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source at absolute positions, and the number of its earlier blocks."""
        sources, ranks = _pattern(self.counts, self.seed)
        periods, places = np.divmod(absolute, PERIOD)
        found = sources[places]
        return found, periods * np.array(self.counts)[found] + ranks[places]

    def _blocks_at(self, absolute: np.ndarray) -> np.ndarray:
        sources, turns = self._turn(absolute)
        found = np.empty_like(turns)
        for source in np.unique(sources):
            here = sources == source
            found[here] = self._first[source] + self._orders[source].blocks(turns[here])
        return found


def _source_seed(seed: int, source: int) -> int:
    digest = hashlib.blake2b(f"{seed}:source {source}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class TokenMixture:
    """The token files of weighted sources, with the interface of one token file for counts."""

    def __init__(self, files: Sequence[TokenFile], weights: Sequence[float]) -> None:
        self.files = tuple(files)
        self.weights = tuple(weights)

    @property
    def num_tokens(self) -> int:
        return sum(file.num_tokens for file in self.files)

    @property
    def fingerprint(self) -> str:
        parts = [[file.fingerprint for file in self.files], apportion(self.weights, PERIOD)]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    @property
    def meta(self) -> dict[str, Any]:
        """Metadata for a run's record: totals, and meta.json of each file with its weight."""
        return {
            "fingerprint": self.fingerprint,
            "tokens": self.num_tokens,
            "documents": sum(file.num_documents for file in self.files),
            "vocab_size": max(file.vocab_size for file in self.files),
            "mixture": [
                {"weight": weight, **file.meta}
                for weight, file in zip(self.weights, self.files, strict=True)
            ],
        }

    def sample(self, num_tokens: int) -> np.ndarray:
        """Return about `num_tokens` tokens, uint32: the first of each file, by weight."""
        parts = apportion(self.weights, num_tokens)
        return np.concatenate(
            [file.sample(part) for file, part in zip(self.files, parts, strict=True)]
        )
