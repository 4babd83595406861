"""Tokenizers, trained or loaded: any text comes back from its ids unchanged.

Both kinds have two special tokens, `<|endoftext|>` (begin and end of a document) and `<|padding|>`,
as ids 0 and 1, and no unknown token: every byte has an id of its own.
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

# SentencePiece stands these for a space and for its own end marks, so they cannot be learned as
# text.
_RESERVED = str.maketrans({"\u2581": "\n", "\u2585": "\n", "\0": "\n"})
# SentencePiece leaves out longer lines (its limit is 4192 bytes) with a mere log line, so they are
# cut.
_MAX_LINE = 1000
# The time of BPE's training grows with the square of a word's length, so longer ones are cut, too.
_MAX_WORD = 1000
# The trained file depends on the number of threads (sums of floats), so it must not be the
# machine's.
_THREADS = 8
# Far below every log probability: a reserved piece is never chosen for text that happens to spell
# it.
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

    Equal texts give equal files, whatever the machine's number of cores. Ctrl-C ends the training,
    which runs in a thread for that.

    Args:
        kind: "bpe" is GPT-2's byte-level BPE; "sentencepiece" is a SentencePiece unigram model with
            byte fallback, its space mark stored as a plain space so that a real U+2581 survives.
        vocab_size: most ids, the special tokens included; little text gives fewer.

    Raises:
        DataError: no text, an unknown kind, or a vocabulary too small for single characters.
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
    """Return a line that says that a trained tokenizer has fewer tokens than asked for, or None."""
    if len(tokenizer) >= vocab_size:
        return None
    return (
        f"tokenizer: this text gives {len(tokenizer):,} tokens of vocab_size {vocab_size:,}; more "
        "text gives more"
    )


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise DataError(f"vocab_size is {vocab_size}, byte-level BPE needs at least {smallest}")
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
            # No rewriting of text of any kind, so that ids stand for exactly what was written.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\n\n"],
            # A text that spells a reserved piece is then written with single characters.
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
            f"vocab_size is {vocab_size}, with which SentencePiece cannot train on this text: "
            f"{error}; raise it, or give more text"
        ) from error
    return _convert(SentencePieceProcessor(model_proto=model.getvalue()))


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines to train SentencePiece on: short, and without the marks it uses itself.

    A text like "<0x41>" needs no care: pieces never span letters and digits or signs.
    """
    for text in texts:
        for line in text.translate(_RESERVED).split("\n"):
            for start in range(0, len(line), _MAX_LINE):
                yield line[start : start + _MAX_LINE]


def _convert(model: SentencePieceProcessor) -> Tokenizer:
    """The same unigram model in `tokenizers`: spaces stand for themselves, newlines for themselves.

    Splitting before a space changes nothing, because no SentencePiece piece has one after a letter.
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
    # tokenizer.json last: a folder that has it has the rest.
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "tokenizer.json"):
        durable.rename(file, folder / file.name)
    temporary.rmdir()
    return tokenizer


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder (or the Hub, where there is one) through `AutoTokenizer`.

    A folder with nothing but GPT-2's `vocab.json` and `merges.txt` is loaded as GPT-2's tokenizer.

    Raises:
        DataError: nothing that can be loaded is there, or it has no end-of-sequence token.
    """
    # Without a config file AutoTokenizer does not know the class.
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
    """Return whether a folder has GPT-2's two files only, with its end of text among the tokens."""
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
    """Ids to put before and after every document, so that each of its tokens can be predicted.

    With one shared boundary token the next document's prefix is the label that ends this one, and
    there is no suffix; with two, the document ends with its own eos.

    Raises:
        DataError: the tokenizer has no eos token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos_token, which must end every document: set one")
    eos = cast(int, tokenizer.eos_token_id)
    bos = eos if tokenizer.bos_token_id is None else cast(int, tokenizer.bos_token_id)
    return [bos], [] if bos == eos else [eos]
