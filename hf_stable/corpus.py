"""From a recipe's text to what the loop reads: a tokenizer and blocks of tokens, in an order."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.constants import HF_HOME
from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedTokenizerBase

from .data import (
    BlockDataset,
    DataOrder,
    MixtureOrder,
    Order,
    ReadReport,
    Source,
    TokenFile,
    TokenMixture,
    apportion,
    build_token_file,
    expand,
    load_tokenizer,
    read_documents,
    refuse_unusable,
    train_tokenizer,
)
from .data.identity import identify
from .errors import DataError
from .recipes import Recipe, SourceRecipe

# Muennighoff et al. 2023 (arXiv 2305.16264): up to here text read again is worth about as much as
# new text.
_HARMLESS_EPOCHS = 4
# More in one step than whoever wants to overfit a batch would ask for.
_MOST_READINGS = 100


@dataclass(frozen=True)
class Corpus:
    """Token files and their blocks of the recipe's sequence length.

    Training sources with weights have a file each, whose blocks stand one after another in `train`;
    `training_order` says which comes when. Their validation blocks are shuffled once, so that the
    first ones are not all of one source.
    """

    train_tokens: TokenFile | TokenMixture
    validation_tokens: TokenFile
    train: BlockDataset | ConcatDataset[Any]
    validation: BlockDataset | Subset[Any]


@dataclass(frozen=True)
class SourceUse:
    """What a run takes of one training source, or of all of them where they have no weights."""

    paths: list[str]
    share: float
    """Of the training tokens."""
    tokens: int
    """What the source has."""
    epochs: float
    """How often the run reads it."""

    def line(self) -> str:
        """One line to print before training."""
        more = " (more than 4: worth less than new text)" if self.epochs > _HARMLESS_EPOCHS else ""
        return (
            f"{', '.join(self.paths)}: {self.share:.2%} of the tokens, has {self.tokens:,}, "
            f"read {self.epochs:.2f} times{more}"
        )


def sources_of(recipe: Recipe) -> tuple[list[Source], list[Source]]:
    """Training and validation sources; without validation text, a part of each training source."""

    def convert(source: SourceRecipe, **changes: object) -> Source:
        fields = asdict(source)
        del fields["weight"], fields["license"]
        return Source(**{**fields, **changes})

    data = recipe.data
    if data.validation:
        return [convert(item) for item in data.train], [convert(item) for item in data.validation]
    held_out = {"holdout": data.holdout}
    return (
        [convert(item, part="train", **held_out) for item in data.train],
        [convert(item, part="validation", **held_out) for item in data.train],
    )


def describe_data(recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """What run.json says of the text, by "train" and "validation", with the recipe's licences."""
    train, validation = sources_of(recipe)
    named = [source.license for source in recipe.data.train]
    held_out = [source.license for source in recipe.data.validation] or named
    return {
        "train": _licensed(corpus.train_tokens.meta, train, named),
        "validation": _licensed(corpus.validation_tokens.meta, validation, held_out),
    }


def _licensed(
    meta: dict[str, Any], sources: list[Source], licences: list[str | None]
) -> dict[str, Any]:
    if not any(licences):
        return meta
    if "mixture" in meta:
        parts = zip(meta["mixture"], sources, licences, strict=True)
        mixture = [_licensed(part, [source], [name]) for part, source, name in parts]
        return {**meta, "mixture": mixture}
    # By order, which the fingerprint holds: a cached file may have been built from other places.
    names = [name for source, name in zip(sources, licences, strict=True) for _ in expand([source])]
    each = zip(meta["sources"], names, strict=True)
    return {
        **meta,
        "sources": [{**about, "license": name} if name else about for about, name in each],
    }


def _first_bytes(sources: Sequence[Source], limit: int) -> Iterator[str]:
    """Documents of the sources in order, up to `limit` bytes of UTF-8."""
    seen = 0
    for source in expand(sources):
        for text in read_documents(source, ReadReport()):
            yield text
            seen += len(text.encode())
            if seen >= limit:
                return


def _tokenizer_text(
    sources: list[Source], weights: list[float] | None, limit: int
) -> Iterator[str]:
    """What a tokenizer is trained on; of weighted sources, bytes in proportion to the weights."""
    if weights is None:
        yield from _first_bytes(sources, limit)
        return
    for source, part in zip(sources, apportion(weights, limit), strict=True):
        yield from _first_bytes([source], part)


def _cache(recipe: Recipe) -> Path:
    """Where token files and trained tokenizers are kept."""
    return Path(recipe.data.cache or Path(HF_HOME) / "hf_stable")


def _tokenizer(recipe: Recipe, sources: list[Source]) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, trained on the training text where no finished one is named."""
    wanted = recipe.tokenizer
    if wanted.path is not None:
        try:
            return load_tokenizer(wanted.path)
        except DataError as error:
            raise DataError(f"tokenizer.path: {error}") from error
    cache, weights = _cache(recipe), recipe.data.weights
    contents = [item["content"] for item in identify(expand(sources), cache / "hashes.json")]
    parts = [asdict(wanted), contents, *([weights] if weights else [])]
    identity = json.dumps(parts, sort_keys=True)
    digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    folder = cache / "tokenizers" / f"{wanted.kind}-{wanted.vocab_size}-{digest}"
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    texts = _tokenizer_text(sources, weights, wanted.training_bytes)
    return train_tokenizer(texts, kind=wanted.kind, vocab_size=wanted.vocab_size, folder=folder)


def prepare_corpus(recipe: Recipe, *, progress: bool) -> tuple[PreTrainedTokenizerBase, Corpus]:
    """Train or load the tokenizer and build or open the token files, all kept in the cache.

    Raises:
        DataError: text that cannot be used, or too little of it for one block or a step.
    """
    train, validation = sources_of(recipe)
    refuse_unusable(expand([*train, *validation]))
    tokenizer = _tokenizer(recipe, train)
    if len(tokenizer) > recipe.tokenizer.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size is {recipe.tokenizer.vocab_size}, but the tokenizer has "
            f"{len(tokenizer)} tokens: raise it to at least that."
        )
    folder = _cache(recipe) / "tokens"
    separate, weights = recipe.data.separate_documents, recipe.data.weights

    def blocks(sources: list[Source]) -> BlockDataset:
        file = build_token_file(sources, tokenizer, folder, progress=progress)
        try:
            return BlockDataset(file, recipe.data.sequence_length, separate_documents=separate)
        except DataError as error:
            raise DataError(f"{', '.join(source.path for source in sources)}: {error}") from error

    if weights is None:
        whole, held_out = blocks(train), blocks(validation)
        _check_batch(recipe, len(whole))
        return tokenizer, Corpus(whole.token_file, held_out.token_file, whole, held_out)
    each, held_out = [blocks([source]) for source in train], blocks(validation)
    _check_batch(recipe, sum(len(part) for part in each))
    tokens = TokenMixture([part.token_file for part in each], weights)
    shuffled = DataOrder(0, len(held_out)).blocks(np.arange(len(held_out))).tolist()
    return tokenizer, Corpus(
        tokens, held_out.token_file, ConcatDataset(each), Subset(held_out, shuffled)
    )


def _check_batch(recipe: Recipe, blocks: int) -> None:
    batch = recipe.training.global_batch_size
    if batch > _MOST_READINGS * blocks:
        raise DataError(
            f"training.global_batch_size is {batch:,} blocks, but data.train has only {blocks:,} "
            f"of {recipe.data.sequence_length} tokens, which a step would read {batch // blocks:,} "
            "times: lower it, lower data.sequence_length, or give more text"
        )


def training_order(
    recipe: Recipe, corpus: Corpus, skipped: Sequence[tuple[int, int]] = ()
) -> Order:
    """Which block of `corpus.train` comes when; `skipped` are ranges of absolute positions.

    Raises:
        DataError: a weight too small for one block in `data.mixture.PERIOD`.
    """
    if recipe.data.weights is None:
        return DataOrder(recipe.seed, len(corpus.train), skipped)
    return MixtureOrder(recipe.seed, _block_counts(corpus), recipe.data.weights, skipped)


def _block_counts(corpus: Corpus) -> list[int]:
    if isinstance(corpus.train, BlockDataset):
        return [len(corpus.train)]
    ends = corpus.train.cumulative_sizes
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def planned_epochs(recipe: Recipe, corpus: Corpus) -> list[SourceUse]:
    """How often the whole run reads each weighted source, or all sources as one text."""
    samples = recipe.num_steps * recipe.training.global_batch_size
    order = training_order(recipe, corpus)
    paths, tokens = [source.path for source in recipe.data.train], corpus.train_tokens
    if isinstance(order, MixtureOrder) and isinstance(tokens, TokenMixture):
        total = sum(order.counts)
        uses = zip(paths, order.counts, tokens.files, order.epochs(samples), strict=True)
        return [
            SourceUse([path], count / total, file.num_tokens, epochs)
            for path, count, file, epochs in uses
        ]
    return [SourceUse(paths, 1.0, tokens.num_tokens, samples / len(corpus.train))]
