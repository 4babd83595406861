"""Train and load tokenizers that decode any text back unchanged.

Both kinds have two special tokens, `<|endoftext|>` (start and end of a document) and `<|padding|>`,
with ids 0 and 1. There is no unknown token: every byte has an id.
"""

import io
import json
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, cast

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_stable import durable
from hf_stable.background import run_in_background
from hf_stable.data.progress import Progress
from hf_stable.errors import DataError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"

# SentencePiece uses these characters for a space and for internal marks, so it cannot learn them as
# text.
_RESERVED = str.maketrans({"\u2581": "\n", "\u2585": "\n", "\0": "\n"})
# SentencePiece drops lines above its limit of 4192 bytes with only a log message, so long lines are
# split.
_MAX_LINE = 1000
# The time to train BPE grows with the square of a word's length, so long words are split too.
_MAX_WORD = 1000
# The trained file depends on the number of threads (order of float sums), so the number is fixed.
_THREADS = 8
# Far below every log probability: text that spells a reserved piece is never encoded as that piece.
_NEVER = -1e6


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: Literal["bpe", "sentencepiece"],
    vocab_size: int,
    folder: Path,
    progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer and save it as `folder/tokenizer.json` with its configuration.

    The same texts give the same files on any number of cores. Training runs in a background thread,
    so that Ctrl-C can stop it.

    Args:
        texts: Documents to train on.
        kind: "bpe" is GPT-2's byte-level BPE. "sentencepiece" is a SentencePiece unigram model with
            byte fallback, whose space mark is stored as a space so that a real U+2581 survives.
        vocab_size: Maximum number of ids, including the special tokens; a short text gives fewer.
        folder: Folder to save to.
        progress: Print progress to stderr.

    Raises:
        DataError: If there is no text, the kind is unknown, or the vocabulary is too small for
            single characters.
    """
    train = {"bpe": _train_bpe, "sentencepiece": _train_sentencepiece}.get(kind)
    if train is None:
        raise DataError(f"tokenizer kind is {kind!r}, must be 'bpe' or 'sentencepiece'")
    text_bytes = 0

    def counted(is_left: threading.Event) -> Iterator[str]:
        nonlocal text_bytes
        for text in texts:
            if is_left.is_set():
                raise KeyboardInterrupt
            text_bytes += len(text.encode("utf-8"))
            yield text

    with Progress("training the tokenizer", None, shown=progress) as shown:
        backend = run_in_background(
            lambda is_left: train(counted(is_left), vocab_size),
            lambda: shown.update_time(text_bytes),
        )
    if not text_bytes:
        raise DataError("no text to train a tokenizer on: all documents are empty")
    return _save(backend, Path(folder))


def shortage(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str | None:
    """Return a warning if a trained tokenizer has fewer tokens than requested, else None."""
    if len(tokenizer) >= vocab_size:
        return None
    return (
        f"tokenizer: the text yields {len(tokenizer):,} tokens, fewer than vocab_size "
        f"{vocab_size:,}; more text yields more"
    )


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise DataError(f"vocab_size is {vocab_size}, but byte-level BPE needs at least {smallest}")
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    cut = pre_tokenizers.FixedLength(length=_MAX_WORD)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, cut])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = words
    return backend


def _train_sentencepiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    lines = list(_training_lines(texts))
    if not lines:
        raise DataError("no text to train a tokenizer on: all documents are empty")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            # No normalization at all, so that decoding returns exactly the original text.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\n\n"],
            # Text that spells a reserved piece is then encoded as single characters.
            required_chars="".join(sorted(set(f"{END_OF_TEXT}{PADDING}<0x123456789ABCDEF>"))),
            unk_id=0,
            unk_piece=END_OF_TEXT,
            pad_id=1,
            pad_piece=PADDING,
            bos_id=-1,
            eos_id=-1,
            shuffle_input_sentence=False,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"SentencePiece cannot train on this text with vocab_size {vocab_size}: "
            f"{error}; raise vocab_size, or give more text"
        ) from error
    return _convert(SentencePieceProcessor(model_proto=model.getvalue()))


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield short lines for SentencePiece, without the characters it uses internally.

    Text like "<0x41>" needs no special handling: a piece never spans letters and digits or signs.
    """
    for text in texts:
        for line in text.translate(_RESERVED).split("\n"):
            for start in range(0, len(line), _MAX_LINE):
                yield line[start : start + _MAX_LINE]


def _convert(model: SentencePieceProcessor) -> Tokenizer:
    """Convert the unigram model to `tokenizers`, with plain spaces and newlines.

    Splitting before a space changes nothing, because no SentencePiece piece has a space after a
    letter.
    """
    pieces = [(model.id_to_piece(i), i) for i in range(model.get_piece_size())]
    vocabulary = []
    for piece, i in pieces:
        reserved = model.is_byte(i) or model.is_control(i) or model.is_unknown(i)
        vocabulary.append(
            (piece.replace("\u2581", " "), _NEVER if reserved else model.get_score(i))
        )
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    words = Regex(r"\n+| ?[^ \n]+| +(?![^ \n])| +")
    backend.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([END_OF_TEXT, PADDING])
    return backend


def _save(backend: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    durable.sync_tree(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    # Move tokenizer.json last: a folder with it is complete.
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "tokenizer.json"):
        durable.rename(file, folder / file.name)
    temporary.rmdir()
    return tokenizer


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub through `AutoTokenizer`.

    A folder with only GPT-2's `vocab.json` and `merges.txt` is loaded as GPT-2's tokenizer.

    Raises:
        DataError: If no tokenizer can be loaded, or if it has no end-of-sequence token.
    """
    # Without a config file, AutoTokenizer does not know the class.
    kind = {"tokenizer_type": "gpt2"} if _is_bare_gpt2(Path(path)) else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **kind)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path} holds no tokenizer that can be loaded ({reason}): train one with "
            "`hf-stable tokenizer`, or give the folder that has its tokenizer.json"
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{path} has a tokenizer without eos_token, which must end every document: set "
            "eos_token in its tokenizer_config.json"
        )
    return tokenizer


def _is_bare_gpt2(folder: Path) -> bool:
    """Return True if a folder has only GPT-2's two files and its end-of-text token."""
    if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return False
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return False
    try:
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    return not (folder / "config.json").exists() and END_OF_TEXT in vocabulary


def boundary_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids before and after every document, so that each of its tokens is predicted.

    If bos and eos are the same token, the prefix of the next document is the label that ends this
    one, and there is no suffix. If they differ, every document ends with eos.

    Raises:
        DataError: If the tokenizer has no eos token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos_token, which must end every document: set one")
    eos = cast(int, tokenizer.eos_token_id)
    bos = eos if tokenizer.bos_token_id is None else cast(int, tokenizer.bos_token_id)
    return [bos], [] if bos == eos else [eos]
