"""From a recipe's text to what the loop reads: a tokenizer and blocks of tokens."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .data import (
    BlockDataset,
    ReadReport,
    Source,
    TokenFile,
    build_token_file,
    expand,
    load_tokenizer,
    read_documents,
    train_tokenizer,
)
from .data.identity import identify
from .errors import DataError
from .recipes import Recipe, SourceRecipe


@dataclass(frozen=True)
class Corpus:
    """Token files and their blocks of the recipe's sequence length."""

    train_tokens: TokenFile
    validation_tokens: TokenFile
    train: BlockDataset
    validation: BlockDataset


def sources_of(recipe: Recipe) -> tuple[list[Source], list[Source]]:
    """Training and validation sources; without validation text, a part of each training source."""

    def convert(source: SourceRecipe, **changes: object) -> Source:
        return Source(**{**asdict(source), **changes})

    data = recipe.data
    if data.validation:
        return [convert(item) for item in data.train], [convert(item) for item in data.validation]
    held_out = {"holdout": data.holdout}
    return (
        [convert(item, part="train", **held_out) for item in data.train],
        [convert(item, part="validation", **held_out) for item in data.train],
    )


def _first_bytes(sources: list[Source], limit: int) -> Iterator[str]:
    """Documents of the sources in order, up to `limit` bytes of UTF-8."""
    seen = 0
    for source in expand(sources):
        for text in read_documents(source, ReadReport()):
            yield text
            seen += len(text.encode())
            if seen >= limit:
                return


def _tokenizer(recipe: Recipe, sources: list[Source]) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, trained on the training text where no finished one is named."""
    wanted = recipe.tokenizer
    if wanted.path is not None:
        return load_tokenizer(wanted.path)
    cache = Path(recipe.data.cache)
    contents = [item["content"] for item in identify(expand(sources), cache / "hashes.json")]
    identity = json.dumps([asdict(wanted), contents], sort_keys=True)
    digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    folder = cache / "tokenizers" / f"{wanted.kind}-{wanted.vocab_size}-{digest}"
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    texts = _first_bytes(sources, wanted.training_bytes)
    return train_tokenizer(texts, kind=wanted.kind, vocab_size=wanted.vocab_size, folder=folder)


def prepare_corpus(recipe: Recipe, *, progress: bool) -> tuple[PreTrainedTokenizerBase, Corpus]:
    """Train or load the tokenizer and build or open the token files, all kept in the cache.

    Raises:
        DataError: text that cannot be used, or too little of it for one block.
    """
    train, validation = sources_of(recipe)
    tokenizer = _tokenizer(recipe, train)
    if len(tokenizer) > recipe.tokenizer.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size is {recipe.tokenizer.vocab_size}, but the tokenizer has "
            f"{len(tokenizer)} tokens: raise it to at least that."
        )
    folder = Path(recipe.data.cache) / "tokens"
    separate = recipe.data.separate_documents

    def blocks(sources: list[Source]) -> tuple[TokenFile, BlockDataset]:
        file = build_token_file(sources, tokenizer, folder, progress=progress)
        return file, BlockDataset(file, recipe.data.sequence_length, separate_documents=separate)

    train_tokens, train_blocks = blocks(train)
    validation_tokens, validation_blocks = blocks(validation)
    return tokenizer, Corpus(train_tokens, validation_tokens, train_blocks, validation_blocks)
