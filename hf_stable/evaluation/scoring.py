r"""Perplexity of any causal language model: every token of every document is scored exactly once.

Conventions, because perplexities of different conventions cannot be compared:

- NLL is the sum of -log p(token | the document so far) in nats, by a log-softmax in at least fp32
  of the model's logits. The model's own loss is never read, so z-loss and other auxiliary terms
  cannot enter.
- A document's first token is predicted from the tokenizer's bos (else eos) token, which is put
  before every document. If a tokenizer has neither, first tokens are unscored, and counted as such.
  The end of a document is not scored.
- Text that spells a special token, such as "<unk>" in WikiText, is scored as plain text.
- per token: exp(NLL / scored tokens). Depends on the tokenizer.
- per word: exp(NLL / words), words = whitespace-separated words + newline characters, because
  WikiText (Merity et al. 2016, arXiv:1609.07843) counts one <eos> per line: WikiText-2 validation
  and test then have the published 217,646 and 245,569 tokens. lm-evaluation-harness divides by
  len(re.split(r"\s+", page)), without line ends: a smaller count, a higher result.
- bits per byte: NLL / ln 2 / bytes of UTF-8. Use this to compare across tokenizers.
- Documents longer than a window: see `windows`. stride = max_length is lm-evaluation-harness's
  rolling log-likelihood.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_stable.errors import UserError

from .reporting import Reporter
from .result import PerplexityResult, estimates

# Longest default window in tokens.
DEFAULT_MAX_LENGTH = 4096
# Number of batches whose windows are sorted by length together, so that padding is rare.
_BATCHES_PER_GROUP = 64
# Number of elements in the fp32 copy of a few rows of logits (64 MiB).
_CHUNK_ELEMENTS = 2**24
# Label of targets without a loss: padding, and targets scored by an earlier window.
_UNSCORED = -100


class _Window(NamedTuple):
    """Tokens of one window: ids[:-1] are inputs, ids[1:] targets.

    An earlier window scored the first `skip` targets.
    """

    document: int
    ids: np.ndarray
    skip: int


class _Limits(NamedTuple):
    max_length: int
    stride: int
    batch_size: int


def perplexity(  # noqa: PLR0913 (keywords with defaults, each one question a user may ask)
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    confidence: float = 0.95,
    bootstrap_samples: int = 2000,
    seed: int = 0,
    progress: bool = False,
) -> PerplexityResult:
    """Compute perplexity per token and word, and bits per byte, of `documents`.

    It runs on the device and in the dtype of `model`, whose train or eval mode is restored. Up to
    rounding, the result depends neither on `batch_size` nor on the tokenizer's padding side
    (padding does not use the tokenizer).

    Args:
        model: Any causal language model.
        tokenizer: Tokenizer of the model.
        documents: Texts to score.
        max_length: Tokens of one window; None is the model's max_position_embeddings, at most 4096.
        stride: Newly scored tokens per window; None is `max_length`, no overlap.
        batch_size: Bounds memory: logits of at most batch_size x max_length tokens. More shorter
            windows share a batch.
        confidence: Coverage of the intervals.
        bootstrap_samples: Number of resamples of the documents.
        seed: Seed of the resamples.
        progress: Report progress on stderr.

    Returns:
        Perplexities with their intervals.

    Raises:
        UserError: If an argument is out of range, `max_length` exceeds the model's positions, a
            token id is outside its vocabulary, a document is not text, there is nothing to score,
            or the NLL is not finite.
    """
    _check_bootstrap(confidence, bootstrap_samples)
    limits = _limits(model, max_length, stride, batch_size)
    corpus = _Corpus(tokenizer, model.get_input_embeddings().get_parameter("weight").shape[0])
    with Reporter(progress) as reporter:
        _score_all(model, corpus, corpus.windows(documents, limits), limits, reporter)
    sums = corpus.checked_sums()
    rng = np.random.default_rng(seed)
    found, note = estimates(sums, confidence=confidence, samples=bootstrap_samples, rng=rng)
    nll, tokens, words, num_bytes = sums.sum(axis=0).tolist()
    return PerplexityResult(
        *found,
        nll_nats=nll,
        tokens=int(tokens),
        words=int(words),
        bytes=int(num_bytes),
        documents=len(sums),
        empty_documents=corpus.empty_documents,
        unscored_tokens=corpus.unscored_tokens,
        max_length=limits.max_length,
        stride=limits.stride,
        confidence=confidence,
        interval_note=note,
        document_sums=sums,
    )


def windows(length: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cut a sequence so that each token but the first is the target of exactly one window.

    `begin` is as early as possible, so each target after the first `max_length` has at least
    max_length - stride + 1 inputs.

    Args:
        length: Number of tokens in the sequence.
        max_length: Largest number of inputs of a window.
        stride: Number of new targets of all windows except the first and last.

    Yields:
        (begin, start, end): The model reads positions [begin, end), and positions [start, end)
        predict targets [start + 1, end + 1).
    """
    end = 0
    while end < length - 1:
        start = end
        end = min(start + (stride if start else max_length), length - 1)
        yield max(0, end - max_length), start, end


class _Corpus:
    """Turns documents into windows and keeps the sums of each document."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # The token that training puts before a document (data.boundary_ids).
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self._prefix = np.array([] if first is None else [first], dtype=np.int64)
        self.sums: list[list[float]] = []  # NLL in nats, tokens, words, bytes
        self.empty_documents = 0
        self.unscored_tokens = 0

    def windows(self, documents: Iterable[str], limits: _Limits) -> Iterator[_Window]:
        for number, text in enumerate(documents):
            ids = self._encode(number, text)
            if len(ids) < 2:
                self.empty_documents += 1
                continue
            self.unscored_tokens += not self._prefix.size
            words = len(text.split()) + text.count("\n")
            self.sums.append([0.0, len(ids) - 1, words, len(text.encode())])
            for begin, start, end in windows(len(ids), limits.max_length, limits.stride):
                yield _Window(len(self.sums) - 1, ids[begin : end + 1], start - begin)

    def _encode(self, number: int, text: str) -> np.ndarray:
        if not isinstance(text, str):
            raise UserError(
                f"document {number}: found {type(text).__name__}, expected text; "
                "name the column that holds text"
            )
        # As in the training data, text that spells a special token is plain text.
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        ids = np.append(self._prefix, np.array(encoded["input_ids"], dtype=np.int64))
        if ids.size and ids.max() >= self._vocab_size:
            raise UserError(
                f"document {number}: token id {ids.max()} is outside the model's vocabulary of "
                f"{self._vocab_size}; use the tokenizer that the model was trained with"
            )
        return ids

    def checked_sums(self) -> np.ndarray:
        """Return the sums, (documents, 4) float64; raise UserError if empty or not finite."""
        if not self.sums:
            raise UserError(
                f"no tokens to score: {self.empty_documents} documents, all empty; "
                "check the data path, column and filters"
            )
        sums = np.array(self.sums)
        broken = np.flatnonzero(~np.isfinite(sums[:, 0]))
        if broken.size:
            raise UserError(
                f"the model's NLL is not finite for {broken.size} of {len(sums)} documents (the "
                f"first is number {broken[0]} of those that are not empty); the weights are "
                "damaged or the run diverged, or the dtype is too narrow: try float32"
            )
        return sums


def _score_all(
    model: PreTrainedModel,
    corpus: _Corpus,
    stream: Iterator[_Window],
    limits: _Limits,
    reporter: Reporter,
) -> None:
    was_training = model.training
    model.eval()
    tokens, nll = 0, 0.0
    try:
        while group := list(itertools.islice(stream, _BATCHES_PER_GROUP * limits.batch_size)):
            for batch in _batches(group, limits):
                for window, loss in zip(batch, _score(model, batch), strict=True):
                    corpus.sums[window.document][0] += loss
                    tokens += len(window.ids) - 1 - window.skip
                    nll += loss
                reporter.update(documents=len(corpus.sums), tokens=tokens, nll=nll)
    finally:
        model.train(was_training)


def _batches(group: list[_Window], limits: _Limits) -> Iterator[list[_Window]]:
    """Group windows of similar length, at most batch_size x max_length tokens with padding."""
    budget = limits.batch_size * limits.max_length
    ordered = sorted(group, key=lambda window: len(window.ids), reverse=True)
    begin = 0
    while begin < len(ordered):
        rows = budget // (len(ordered[begin].ids) - 1)
        yield ordered[begin : begin + rows]
        begin += rows


@torch.no_grad()
def _score(model: PreTrainedModel, batch: list[_Window]) -> list[float]:
    """Return the NLL in nats of each window's unscored targets.

    Padding is on the right, where no real token of a causal model attends to it. No attention mask
    is needed, which allows attention backends that support plain causal attention only.
    """
    width = max(len(window.ids) for window in batch) - 1
    input_ids = torch.zeros(len(batch), width, dtype=torch.int64)
    targets = torch.full((len(batch), width), _UNSCORED)
    for row, (_, ids, skip) in enumerate(batch):
        input_ids[row, : len(ids) - 1] = torch.from_numpy(ids[:-1])
        targets[row, skip : len(ids) - 1] = torch.from_numpy(ids[1 + skip :])
    logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits
    return _row_nll(logits, targets).tolist()


def _row_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum -log p(target) of each row in float64 on the CPU, with a softmax in at least fp32.

    Only a few positions are converted at a time, so there is no second tensor of the logits' size.

    Args:
        logits: (rows, width, vocabulary).
        targets: (rows, width) on the CPU.
    """
    width, vocab_size = logits.shape[1:]
    flat_logits, flat_targets = logits.flatten(0, 1), targets.flatten()
    positions = torch.nonzero(flat_targets != _UNSCORED)[:, 0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    sums = torch.zeros(len(targets), dtype=torch.float64)
    for chunk in positions.split(max(1, _CHUNK_ELEMENTS // vocab_size)):
        rows = flat_logits[chunk.to(logits.device)].to(dtype)
        wanted = flat_targets[chunk].to(logits.device)
        nll = torch.nn.functional.cross_entropy(rows, wanted, reduction="none")
        sums.index_add_(0, chunk // width, nll.cpu().double())
    return sums


def _limits(
    model: PreTrainedModel, max_length: int | None, stride: int | None, batch_size: int
) -> _Limits:
    config = model.config.get_text_config()
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    positions: int | None = config.to_dict().get(name)
    length = max_length
    if length is None:
        length = min(positions or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if positions is not None and length > positions:
        raise UserError(
            f"max_length: found {length}, beyond the model's {name} of {positions}; "
            f"pass {positions} or less"
        )
    if length < 1:
        raise UserError(f"max_length: found {length}, expected at least 1 token")
    step = length if stride is None else stride
    if not 1 <= step <= length:
        raise UserError(
            f"stride: found {step}, expected 1 to max_length ({length}) tokens; "
            "a longer stride would leave tokens unscored"
        )
    if batch_size < 1:
        raise UserError(f"batch_size: found {batch_size}, expected at least 1 window")
    return _Limits(length, step, batch_size)


def _check_bootstrap(confidence: float, samples: int) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence: found {confidence}, expected between 0 and 1, such as 0.95")
    # Fewer resamples leave hardly any outside the interval.
    if samples * (1 - confidence) < 5:
        raise UserError(
            f"bootstrap_samples: found {samples}, too few for a confidence of {confidence}; "
            f"use at least {int(np.ceil(5 / (1 - confidence)))}"
        )
