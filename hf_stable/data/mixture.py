"""Weighted sources: which source a position takes, evenly spread and in exact proportion.

Weights are shares of blocks, and so of tokens; how long or many the documents are changes nothing.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from hf_stable.data.order import DataOrder, Order
from hf_stable.data.token_file import TokenFile
from hf_stable.errors import DataError

# Positions after which the sources come in the same order again: a share is exact to 0.005 %.
PERIOD = 10_000


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole parts of `total` in proportion to the weights, by the largest remainder.

    They sum to `total`, and each differs from its exact share by less than one.

    Raises:
        DataError: a weight that is no positive number.
    """
    values = np.asarray(weights, dtype=np.float64)
    if not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise DataError(f"weights are {list(weights)}, each must be a number above 0")
    # Scaled by the largest first: the sum of huge weights would overflow.
    values /= values.max()
    exact = values / values.sum() * total
    parts = np.floor(exact).astype(np.int64)
    order = np.argsort(parts - exact, kind="stable")
    parts[order[: total - int(parts.sum())]] += 1
    return parts.tolist()


@lru_cache(maxsize=8)
def _pattern(counts: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each position of a period, and its earlier occurrences there; (period,) int64.

    Tijdeman's rule (The chairman assignment problem, Discrete Mathematics 32, 1980): among the
    sources that lag by enough, the one whose lag would first become too large is next. In every
    prefix each source is less than one block away from its exact share. The seed decides ties.
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

    Of any PERIOD absolute positions in a row, each source has the same number, `apportion` of the
    weights; no start of a period is more than one block off. Each source has epochs and
    permutations of its own: one that is used up begins again, in another order. Ids are those of
    the sources' blocks one after another (`torch.utils.data.ConcatDataset`).

    Args:
        num_blocks: of each source.
        weights: of each source, positive; only their ratios count.
        seed, skipped: as of `Order`.

    Raises:
        DataError: no block in a source, or a weight too small for one block in a period.
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
            raise DataError(f"{len(num_blocks)} sources have {len(weights)} weights")
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
        """Index of the source (int64) at positions of any shape."""
        return self._turn(self.absolute(positions))[0]

    def epochs(self, num_positions: int) -> list[float]:
        """How often each source is read in the first positions, when none is skipped."""
        periods, rest = divmod(num_positions, PERIOD)
        some = np.bincount(_pattern(self.counts, self.seed)[0][:rest], minlength=len(self.counts))
        blocks = periods * np.array(self.counts) + some
        return (blocks / np.array(self.num_blocks)).tolist()

    def with_skipped(self, start: int, stop: int) -> "MixtureOrder":
        ranges = [*self.skipped, (start, stop)]
        return MixtureOrder(self.seed, self.num_blocks, self.weights, ranges)

    def _turn(self, absolute: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at absolute positions, and how many of its blocks came before."""
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
    """The token files of weighted sources, as one for what counts tokens and records them."""

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
        """What a run records of its data: sums, and meta.json of each file with its weight."""
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
        """About `num_tokens` tokens to count, uint32: the first ones of each file by its weight."""
        parts = apportion(self.weights, num_tokens)
        return np.concatenate(
            [file.sample(part) for file, part in zip(self.files, parts, strict=True)]
        )
