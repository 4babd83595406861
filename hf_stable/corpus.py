"""Prepare the data of a recipe: tokenizer, token blocks and their order."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
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
    shortage,
    train_tokenizer,
)
from .data.holdout import empty_part, hold_out
from .data.identity import identify
from .data.opening import is_pipe
from .data.overlap import repeated_lines, shared_line, shared_text
from .errors import DataError
from .recipes import Recipe, SourceRecipe

# Muennighoff et al. 2023 (arXiv 2305.16264): repeated text is worth about as much as new text up to
# this many epochs.
_HARMLESS_EPOCHS = 4
# More readings in one step than anyone who wants to overfit a batch would request.
_MOST_READINGS = 100


@dataclass(frozen=True)
class Corpus:
    """Token files and their blocks of the recipe's sequence length.

    Training sources with weights have one file each. Their blocks follow one another in `train`,
    and `training_order` mixes them. Their validation blocks are shuffled once, so that the first
    blocks are not all from one source.
    """

    train_tokens: TokenFile | TokenMixture
    validation_tokens: TokenFile
    train: BlockDataset | ConcatDataset[Any]
    validation: BlockDataset | Subset[Any]


@dataclass(frozen=True)
class SourceUse:
    """A run's use of one training source, or of all sources if they have no weights."""

    paths: list[str]
    share: float
    """Share of the training tokens."""
    tokens: int
    """Number of tokens in the source."""
    epochs: float
    """Number of times the run reads the source."""

    def line(self) -> str:
        """Return one line to print before training."""
        more = " (more than 4: worth less than new text)" if self.epochs > _HARMLESS_EPOCHS else ""
        return (
            f"{', '.join(self.paths)}: {self.share:.2%} of training, {self.tokens:,} tokens, "
            f"read {self.epochs:.2f} times{more}"
        )


def sources_of(recipe: Recipe) -> tuple[list[Source], list[Source]]:
    """Return the training and validation sources.

    If the recipe names no validation text, a part of each training source is held out.

    Raises:
        DataError: If text has to be held out and a file cannot be used.
    """

    def convert(source: SourceRecipe) -> Source:
        fields = asdict(source)
        del fields["weight"], fields["license"]
        return Source(**fields)

    data = recipe.data
    train = [convert(item) for item in data.train]
    if data.validation:
        return train, [convert(item) for item in data.validation]
    return hold_out(train, data.holdout, each=data.weights is not None)


def describe_data(recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """Return the data section of run.json, for "train" and "validation", with licenses.

    "share_in_training" is the share of validation text that is also training text.
    """
    train, validation = sources_of(recipe)
    named = [source.license for source in recipe.data.train]
    held_out = [source.license for source in recipe.data.validation] or named
    about = {
        "train": _licensed(corpus.train_tokens.meta, train, named),
        "validation": _licensed(corpus.validation_tokens.meta, validation, held_out),
    }
    share, _ = shared_text(identities_of(about["train"]), identities_of(about["validation"]))
    if share:
        about["validation"] = {**about["validation"], "share_in_training": share}
    return about


def identities_of(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the fingerprints of the files and datasets in a token file or a mixture."""
    return [source for part in meta.get("mixture", [meta]) for source in part.get("sources", [])]


def training_text_line(sources: list[Source], data: dict[str, Any]) -> str | None:
    """Return a warning if expanded sources contain training text of a run, else None.

    Args:
        sources: Expanded sources to evaluate.
        data: Data section of run.json. Only files with the size of a training file are compared.
    """
    train = identities_of(data.get("train") or {})
    sizes = {identity.get("bytes") for identity in train}
    files = [Path(source.path) for source in sources]
    alike = [
        source
        for source, file in zip(sources, files, strict=True)
        if file.is_file() and not is_pipe(file) and file.stat().st_size in sizes
    ]
    with TemporaryDirectory() as folder:
        found = identify(alike, Path(folder) / "hashes.json")
    _, paths = shared_text(train, found)
    if not paths:
        return None
    return f"data: evaluating on training text of this run: {', '.join(paths)}"


def _licensed(
    meta: dict[str, Any], sources: list[Source], licenses: list[str | None]
) -> dict[str, Any]:
    if not any(licenses):
        return meta
    if "mixture" in meta:
        parts = zip(meta["mixture"], sources, licenses, strict=True)
        mixture = [_licensed(part, [source], [name]) for part, source, name in parts]
        return {**meta, "mixture": mixture}
    # Match by order, which is part of the fingerprint: a cached token file may have been built from
    # the same text at other paths.
    names = [name for source, name in zip(sources, licenses, strict=True) for _ in expand([source])]
    each = zip(meta["sources"], names, strict=True)
    return {
        **meta,
        "sources": [{**about, "license": name} if name else about for about, name in each],
    }


def _first_bytes(sources: Sequence[Source], limit: int) -> Iterator[str]:
    """Yield documents of the sources in order, up to `limit` bytes of UTF-8."""
    seen, report = 0, ReadReport()
    for source in expand(sources):
        for text in read_documents(source, report):
            yield text
            seen += len(text.encode())
            if seen >= limit:
                return
    if not seen:
        raise DataError(empty_part(sources, report.other_part_documents))


def _tokenizer_text(
    sources: list[Source], weights: list[float] | None, limit: int
) -> Iterator[str]:
    """Yield the text to train a tokenizer on; weighted sources give bytes in proportion."""
    if weights is None:
        yield from _first_bytes(sources, limit)
        return
    for source, part in zip(sources, apportion(weights, limit), strict=True):
        yield from _first_bytes([source], part)


def _cache(recipe: Recipe) -> Path:
    """Return the folder of token files and trained tokenizers."""
    return Path(recipe.data.cache or Path(HF_HOME) / "hf_stable")


def _tokenizer(recipe: Recipe, sources: list[Source], *, progress: bool) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, or train one on the training text if no path is given."""
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
    return train_tokenizer(
        texts, kind=wanted.kind, vocab_size=wanted.vocab_size, folder=folder, progress=progress
    )


def prepare_corpus(recipe: Recipe, *, progress: bool) -> tuple[PreTrainedTokenizerBase, Corpus]:
    """Train or load the tokenizer and build or open the token files, all cached.

    Raises:
        DataError: If text cannot be used, or is too short for one block or one step.
    """
    train, validation = sources_of(recipe)
    refuse_unusable(expand([*train, *validation]))
    if progress:
        _tell_of_text(recipe, train, validation)
    tokenizer = _tokenizer(recipe, train, progress=progress)
    if progress and recipe.tokenizer.path is None:
        _say(shortage(tokenizer, recipe.tokenizer.vocab_size))
    if len(tokenizer) > recipe.tokenizer.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size is {recipe.tokenizer.vocab_size}, but the tokenizer has "
            f"{len(tokenizer)} tokens: raise vocab_size to at least that."
        )
    folder = _cache(recipe) / "tokens"
    separate, weights = recipe.data.separate_documents, recipe.data.weights

    def blocks(sources: list[Source]) -> BlockDataset:
        file = build_token_file(sources, tokenizer, folder, progress=progress)
        try:
            return BlockDataset(file, recipe.data.sequence_length, separate_documents=separate)
        except DataError as error:
            is_held_out = sources is validation and not recipe.data.validation
            part = "the validation part of " if is_held_out else ""
            hint = f"; data.holdout is {recipe.data.holdout:g}" if is_held_out else ""
            paths = ", ".join(source.path for source in sources)
            raise DataError(f"{part}{paths}: {error}{hint}") from error

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


def _tell_of_text(recipe: Recipe, train: list[Source], validation: list[Source]) -> None:
    """Print warnings about text that is held out by tails, repeated or shared."""
    if validation[0].holdout_by == "tail":
        _say(
            "data: too few documents to hold out whole ones, so the end of each document is "
            f"validation text (data.holdout {recipe.data.holdout:g}); set data.validation to use "
            "other text"
        )
    memory = _cache(recipe) / "hashes.json"
    parts = [identify(expand(sources), memory) for sources in (train, validation)]
    lines = repeated_lines(parts[0], "data.train")
    if recipe.data.validation:
        lines += repeated_lines(parts[1], "data.validation")
    for line in lines:
        _say(line)
    share, paths = shared_text(*parts)
    if share:
        _say(shared_line(share, paths, "name other files in data.validation"))


def _say(line: str | None) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)


def _check_batch(recipe: Recipe, blocks: int) -> None:
    batch = recipe.training.global_batch_size
    if batch > _MOST_READINGS * blocks:
        raise DataError(
            f"training.global_batch_size is {batch:,} blocks, but data.train has only {blocks:,} "
            f"of {recipe.data.sequence_length} tokens, so one step would read them "
            f"{batch // blocks:,} times: lower it, lower data.sequence_length, or give more text"
        )


def training_order(
    recipe: Recipe, corpus: Corpus, skipped: Sequence[tuple[int, int]] = ()
) -> Order:
    """Return the order of the blocks of `corpus.train`.

    Args:
        recipe: Recipe of the run.
        corpus: Data of the recipe.
        skipped: Ranges of absolute positions to skip.

    Raises:
        DataError: If a weight is too small for one block in `data.mixture.PERIOD`.
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
    """Return the whole run's use of each weighted source, or of all sources as one text."""
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
