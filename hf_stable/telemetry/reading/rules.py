"""Signs of instability: the number that each rule judges, and its limit per layer and sample.

Some limits are absolute. The others are a factor over the layer's trailing median, taken over the
samples in the latter half of the steps so far. Healthy growth is a power of the step, and twice
that median needs growth faster than about step ** 2. A relative rule judges nothing before there
are eight samples in that half. Except for the update, it also judges nothing while the loss is more
than 0.1 nats under its own trailing median, because branches that start small grow severalfold
while the model learns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from hf_stable.telemetry.reading.history import History
from hf_stable.telemetry.reading.onset import smoothed

# A median is taken over at most this many evenly chosen samples of its window. This keeps live
# views fast and hardly changes the median.
_MEDIAN_SAMPLES = 64


@dataclass(frozen=True)
class Thresholds:
    """Limits of the rules. "Ours" marks numbers that no paper gives."""

    max_logit: float = 1e4
    """Largest attention logit before a cap: all runs above it diverged (Wortsman et al. 2023)."""
    max_logit_early: float = 1e3
    """Largest attention logit before a cap, as an early sign: logits forced to this size began to
    cost loss (Wortsman et al., 10M)."""
    entropy: float = 0.1
    """Attention entropy over log(visible keys), mean over a layer's heads. Entropy collapse
    precedes divergence (Zhai et al. 2023); the number is ours. One head that attends to a single
    key is healthy, but all heads of a layer are not."""
    clipped_rows: float = 0.5
    """Share of attention rows that a clipped softmax sets to zero, mean over heads (ours)."""
    output_growth: float = 2.0
    """Output RMS of QKV, Proj and FC2 over the trailing median. In Rybakov et al. 2024, QKV's
    output has more than doubled by step 1,000 in a run that diverges later."""
    input_grad_jump: float = 5.0
    """Gradient of the input of QKV and FC1 over the trailing median. Its explosion distinguishes
    runs in Rybakov et al.; the number is ours, above the noise of single batches."""
    update_jump: float = 2.0
    """A layer's update, divided by its learning rate, over the trailing median. It spiked first in
    Marin's 32B run and in Molybog et al. 2023. The number is ours: Adam's update is usually about a
    third of its bound."""
    grad_over_eps: float = 10.0
    """Gradient RMS over Adam's eps. At this ratio, eps reduces a usual update by a tenth (ours;
    Wortsman et al. see harm at 1)."""
    log_z: float = 100.0
    """Absolute mean of log Z. From 128 on, bf16 logits are 1 apart, which is the reason for PaLM's
    z-loss; the number is ours."""
    samples: int = 8
    """Number of samples that a trailing median needs."""
    learning: float = 0.1
    """Drop of the loss under its trailing median, in nats, above which growth is attributed to
    learning. The number is ours: in small healthy runs, Proj's and FC2's outputs grew up to 6-fold
    and the gradients up to 10-fold while the loss dropped faster, and less than the limits above
    afterwards."""


@dataclass(frozen=True)
class Rule:
    """One sign.

    Args:
        key: Name of the rule.
        places: Packed places that are judged, each separately.
        quantity: Quantity that is judged.
        limit: Function that returns the limit, or the factor if `relative`.
        words: Description of the number, a format string with `{place}`.
        reduce: Function from (S, L) or (S, L, H) to (S, L).
        below: True if small numbers are bad.
        relative: True if the limit is a factor over the trailing median.
        per_rate: True to divide samples by their learning rates before comparing them.
        settled: True to judge only when the loss has nearly stopped falling.
    """

    key: str
    places: tuple[str, ...]
    quantity: str
    limit: Callable[[Thresholds], float]
    words: str
    reduce: Callable[[np.ndarray], np.ndarray] = np.asarray
    below: bool = False
    relative: bool = False
    per_rate: bool = False
    settled: bool = False


@dataclass(frozen=True)
class Judgement:
    """Result of one rule on one column: (S, L) values and limits, with L = 1 outside of layers.

    NaN means "no value" or "no limit yet". `usual` is the trailing median of a relative rule.
    """

    rule: Rule
    column: str
    values: np.ndarray
    limits: np.ndarray
    usual: np.ndarray | None

    @property
    def crossed(self) -> np.ndarray:
        """(S, L) bool, True where values are beyond limits."""
        return self.values < self.limits if self.rule.below else self.values > self.limits

    @property
    def within(self) -> np.ndarray:
        """(S, L) bool, True where values were judged and are not beyond limits."""
        return ~(self.crossed | np.isnan(self.values) | np.isnan(self.limits))

    @property
    def closeness(self) -> np.ndarray:
        """(S, L), from 0 (usual, or far from the limit) to 1 (at the limit); NaN if not judged."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.usual is not None:
                share = np.log(self.values / self.usual) / np.log(self.limits / self.usual)
                return np.maximum(share, 0)
            return self.limits / self.values if self.rule.below else self.values / self.limits

    def name(self, layer: int) -> str:
        """Return the name of the series judged for a layer, e.g. `layers.1.qkv/output_rms`."""
        return self.column.replace("*", str(layer))


def _largest(values: np.ndarray) -> np.ndarray:
    return np.fmax.reduce(values, axis=2)


def _mean(values: np.ndarray) -> np.ndarray:
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0.0).sum(2) / there.sum(2)


def _growth(key: str, places: tuple[str, ...]) -> Rule:
    return Rule(
        key=key,
        places=places,
        quantity="output_rms",
        limit=lambda t: t.output_growth,
        words="the output RMS of {place}",
        relative=True,
        settled=True,
    )


def _explosion(key: str, places: tuple[str, ...]) -> Rule:
    return Rule(
        key=key,
        places=places,
        quantity="input_grad_l2",
        limit=lambda t: t.input_grad_jump,
        words="the gradient in the input of {place}",
        relative=True,
        settled=True,
    )


def _logit(key: str, limit: Callable[[Thresholds], float]) -> Rule:
    words = "the largest attention logit"
    return Rule(key, ("layers.*.attention",), "max_logit", limit, words, reduce=_largest)


def _in_layers(*places: str) -> tuple[str, ...]:
    return tuple(f"layers.*.{place}" for place in places)


# Includes the names of other model families for our qkv, proj, fc1 and fc2.
_QKV = _in_layers("qkv", "q", "k", "v")
RULES = (
    _logit("max_logit", lambda t: t.max_logit),
    _logit("max_logit_early", lambda t: t.max_logit_early),
    Rule(
        key="entropy",
        places=_in_layers("attention"),
        quantity="entropy",
        limit=lambda t: t.entropy,
        words="the mean attention entropy (1 is uniform)",
        reduce=_mean,
        below=True,
    ),
    Rule(
        key="clipped_rows",
        places=_in_layers("attention"),
        quantity="clipped_rows",
        limit=lambda t: t.clipped_rows,
        words="the share of attention rows that are clipped to zero",
        reduce=_mean,
    ),
    _growth("qkv_output", _QKV),
    _growth("proj_output", _in_layers("proj")),
    _growth("fc2_output", _in_layers("fc2")),
    _explosion("qkv_input_grad", _QKV),
    _explosion("fc1_input_grad", _in_layers("fc1", "gate")),
    Rule(
        key="update",
        places=_in_layers("optimizer"),
        quantity="update_l2",
        limit=lambda t: t.update_jump,
        words="the update, for its learning rate,",
        relative=True,
        per_rate=True,
    ),
    Rule(
        key="grad_over_eps",
        places=_in_layers("optimizer"),
        quantity="grad_rms_over_eps",
        limit=lambda t: t.grad_over_eps,
        words="the gradient RMS over Adam's eps",
        below=True,
    ),
    Rule("log_z", ("head",), "log_z_mean", lambda t: t.log_z, "the size of mean log Z", np.abs),
)


def judgements(history: History, thresholds: Thresholds) -> Iterator[Judgement]:
    """Yield the result of every rule on every column that it judges."""
    rates, settled = _learning_rates(history), _settled(history, thresholds)
    for rule in RULES:
        for place in rule.places:
            column = f"{place}/{rule.quantity}"
            if column not in history.telemetry:
                continue
            values = rule.reduce(history.telemetry[column])
            values = values[:, None] if values.ndim == 1 else values
            limit, usual = np.full(values.shape, rule.limit(thresholds)), None
            if rule.relative:
                scale = rates[:, None] if rule.per_rate else np.ones((len(values), 1))
                usual = _trailing_medians(history.steps, values / scale, thresholds.samples) * scale
                usual[~settled & rule.settled] = np.nan
                limit = limit * usual
            yield Judgement(rule, column, values, limit, usual)


def _settled(history: History, thresholds: Thresholds) -> np.ndarray:
    """Return (S,) bool, True where the smoothed loss is close to its trailing median.

    It is False if unknown.
    """
    if "loss" not in history.train:
        return np.zeros(len(history.steps), dtype=bool)
    steps, losses = history.train["step"], smoothed(history.train["loss"])
    losses = np.interp(history.steps, steps, losses, left=np.nan)
    medians = _trailing_medians(history.steps, losses[:, None], thresholds.samples)[:, 0]
    return ~(medians - losses > thresholds.learning) & ~np.isnan(medians)


def _learning_rates(history: History) -> np.ndarray:
    """Return (S,) interpolated learning rates; NaN outside of the log lines and where zero."""
    if "learning_rate" not in history.train:
        return np.full(len(history.steps), np.nan)
    steps, rates = history.train["step"], history.train["learning_rate"]
    between = np.interp(history.steps, steps, rates, left=np.nan, right=np.nan)
    return np.where(between > 0, between, np.nan)


def _trailing_medians(steps: np.ndarray, values: np.ndarray, needed: int) -> np.ndarray:
    """Return the (S, L) median over earlier samples t with step / 2 <= t; NaN if too few."""
    ends = np.arange(len(steps))
    starts = np.searchsorted(steps, steps / 2)
    counts = np.minimum(ends - starts, _MEDIAN_SAMPLES)
    order = np.arange(_MEDIAN_SAMPLES)
    chosen = starts[:, None] + order * (ends - starts)[:, None] // np.maximum(counts, 1)[:, None]
    inside = order < counts[:, None]
    medians = np.full(values.shape, np.nan)
    for layer in range(values.shape[1]):
        column = np.where(np.isfinite(values[:, layer]), values[:, layer], np.nan)
        window = np.where(inside, column[np.where(inside, chosen, 0)], np.nan)
        medians[:, layer] = _medians_of_rows(window, needed)
    return medians


def _medians_of_rows(window: np.ndarray, needed: int) -> np.ndarray:
    """Return (S,) medians of (S, M) without NaN; NaN for a row with fewer numbers than needed."""
    ordered = np.sort(window, axis=1)  # NaN last
    counts = (~np.isnan(ordered)).sum(axis=1)
    rows = np.arange(len(ordered))
    low, high = np.maximum(counts - 1, 0) // 2, np.minimum(counts // 2, window.shape[1] - 1)
    medians = (ordered[rows, low] + ordered[rows, high]) / 2
    return np.where(counts >= needed, medians, np.nan)
