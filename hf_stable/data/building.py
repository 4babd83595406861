"""Build a token file from text.

A build can be interrupted at any moment. Resuming gives the same bytes as an uninterrupted build.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_stable.data.checking import refuse_unusable
from hf_stable.data.expanding import expand
from hf_stable.data.holdout import empty_part
from hf_stable.data.identity import estimated_bytes, identify
from hf_stable.data.progress import Progress
from hf_stable.data.report import ReadReport
from hf_stable.data.shards import SHARD_TOKENS, TOKEN, ShardWriter, open_at, sync
from hf_stable.data.sources import Source, is_dataset, read_documents
from hf_stable.data.streams import DatasetRows
from hf_stable.data.token_file import FORMAT, TokenFile
from hf_stable.data.tokenizer import boundary_ids
from hf_stable.errors import DataError
from hf_stable.records import write_json

# Bytes of text tokenized at once, and tokens between two points from which a build can resume.
BATCH_BYTES = 2_000_000
RECORD_TOKENS = 4_000_000
# Part of every fingerprint. Raise it when the same text and tokenizer give different tokens.
_RULES = 1
_START = np.dtype("<i8")


@dataclass(frozen=True)
class _Plan:
    """Everything that determines the bytes of a token file."""

    sources: list[Source]
    identities: list[dict[str, Any]]
    found: ReadReport
    backend: Tokenizer
    prefix: list[int]
    suffix: list[int]

    def tokenizer_hash(self) -> str:
        return hashlib.blake2b(self.backend.to_str().encode(), digest_size=16).hexdigest()

    def fingerprint(self) -> str:
        parts = [_RULES, self.tokenizer_hash(), self.prefix, self.suffix]
        parts.append([identity["content"] for identity in self.identities])
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@dataclass
class _State:
    """Position of a build: everything before this point is on disk.

    For a file, `report` holds the counts from before the file: a resumed build reads and counts
    the file again from its beginning, but does not tokenize the documents again. For a `datasets`
    name, `report` holds the counts from before `rows`, the position to resume from.
    """

    source: int = 0
    source_documents: int = 0
    documents: int = 0
    tokens: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] | None = None


def build_token_file(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    progress: bool,
) -> TokenFile:
    """Tokenize all documents into `folder/<fingerprint>/`, or reuse the token file there.

    The fingerprint is a pure function of the tokenizer and of the content of the sources; their
    paths and modification times do not matter. An interrupted build resumes from its last recorded
    point, at most RECORD_TOKENS tokens and a batch back. Sources that changed in the meantime have
    another fingerprint and are built from the start. A second process that needs the same file
    waits for the first. Text that spells a special token is tokenized as text. Documents that were
    left out are listed in `meta["report"]` and printed to stderr.

    Args:
        sources: Sources of text, not yet expanded.
        tokenizer: Tokenizer with a fast backend.
        folder: Folder that holds the token files, one subfolder each.
        progress: Print progress to stderr.

    Raises:
        DataError: If a source is unusable or changed while it was read, if there is no document at
            all, or if the tokenizer has no fast backend or no eos token.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = _plan(sources, tokenizer, folder)
    place = folder / plan.fingerprint()[:16]
    with _only_one(place):
        refuse_unusable(_unchecked(plan, place))
        if not (place / "meta.json").exists():
            place.mkdir(exist_ok=True)
            _build(plan, place, progress)
        elif progress:
            print(f"tokens: using {place}", file=sys.stderr, flush=True)
    return TokenFile.open(place, verify=False)


def _plan(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, folder: Path) -> _Plan:
    report = ReadReport()
    files = expand(sources, report)
    backend = _backend(tokenizer)
    prefix, suffix = boundary_ids(tokenizer)
    identities = identify(files, folder / "identities.json")
    return _Plan(files, identities, report, backend, prefix, suffix)


def _unchecked(plan: _Plan, place: Path) -> list[Source]:
    """Return the sources to check; of a finished token file, those with bad documents."""
    if (place / "progress.json").exists():
        return []
    if not (place / "meta.json").exists():
        return plan.sources
    meta = TokenFile.open(place, verify=False).meta
    bad = meta["report"]["bad_counts"]
    pairs = zip(plan.sources, meta["sources"], strict=True)
    return [source for source, about in pairs if about["path"] in bad]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy that neither truncates nor pads, and reads special tokens as text."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r} is a {type(tokenizer).__name__} without a "
            "tokenizer.json: save it as a fast tokenizer, or train one with `hf-stable tokenizer`"
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def _only_one(place: Path) -> FileLock:
    """Acquire the lock of a token file; the system frees it when the process ends."""
    lock = FileLock(f"{place}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"tokens: waiting for another process to build {place}", file=sys.stderr, flush=True)
        lock.acquire()
    return lock


def _build(plan: _Plan, place: Path, progress: bool) -> None:
    state = _resume(place)
    report = ReadReport(**state.report)
    totals = [estimated_bytes(source) for source in plan.sources]
    total = sum(n for n in totals if n is not None) if None not in totals else None
    with (
        Progress("tokenizing", total, state.tokens, shown=progress) as shown,
        _Writer(place, plan, state) as writer,
    ):
        for index in range(state.source, len(plan.sources)):
            state.report = report.to_dict()
            rows = _rows_of(plan.sources[index], state)
            skip = 0 if rows else state.source_documents
            for texts in _batches(read_documents(plan.sources[index], report, skip, rows)):
                writer.write(texts)
                if writer.is_record_due():
                    if rows:
                        state.rows, state.report = rows.place(), report.to_dict()
                    writer.record()
                shown.update(report.text_bytes + report.other_part_bytes, state.tokens)
            state.source, state.source_documents, state.rows = index + 1, 0, None
        state.report = report.to_dict()
        writer.record()
    report.ignored_files = plan.found.ignored_files
    report.left_files = plan.found.left_files
    for line in report.lines() if progress else report.problem_lines():
        print(f"tokens: {line}", file=sys.stderr, flush=True)
    _refuse_changes(plan, place)
    _finish(plan, place, state, report, writer.shards)


def _rows_of(source: Source, state: _State) -> DatasetRows | None:
    """Return the rows of a `datasets` name from the recorded position; None for files."""
    return DatasetRows(source, state.rows) if is_dataset(source) else None


def _refuse_changes(plan: _Plan, place: Path) -> None:
    """Discard the build if a file no longer matches the fingerprint."""
    files = [i for i, source in enumerate(plan.sources) if not is_dataset(source)]
    now = identify([plan.sources[i] for i in files], place.parent / "identities.json")
    for i, identity in zip(files, now, strict=True):
        if identity["content"] != plan.identities[i]["content"]:
            (place / "progress.json").unlink()
            raise DataError(
                f"{plan.sources[i].path} changed while it was read: run again when no process "
                "writes to it"
            )


def _resume(place: Path) -> _State:
    """Return the last recorded point, or the start."""
    path = place / "progress.json"
    if not path.exists():
        return _State()
    state = _State(**json.loads(path.read_text(encoding="utf-8")))
    print(
        f"tokens: resuming {place} after {state.documents:,} documents",
        file=sys.stderr,
        flush=True,
    )
    return state


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Yield documents in order, in batches of about BATCH_BYTES characters."""
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


class _Writer:
    """Append tokens and document starts.

    `record` flushes both to disk before it writes the state.
    """

    def __init__(self, place: Path, plan: _Plan, state: _State) -> None:
        self._path = place / "progress.json"
        self._plan = plan
        self._state = state
        self._recorded = state.tokens
        self._tokens = ShardWriter(place, state.tokens, SHARD_TOKENS)
        self._starts = open_at(place / "documents.bin", state.documents * _START.itemsize)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._starts.close()

    @property
    def shards(self) -> list[tuple[str, int]]:
        return self._tokens.shards

    def write(self, texts: list[str]) -> None:
        plan, state = self._plan, self._state
        encodings = plan.backend.encode_batch_fast(texts, add_special_tokens=False)
        documents = [plan.prefix + encoding.ids + plan.suffix for encoding in encodings]
        lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
        ends = state.tokens + np.cumsum(lengths)
        self._tokens.write(
            np.fromiter(chain.from_iterable(documents), TOKEN, count=int(lengths.sum()))
        )
        (ends - lengths).astype(_START).tofile(self._starts)
        state.tokens = int(ends[-1])
        state.documents += len(texts)
        state.source_documents += len(texts)

    def is_record_due(self) -> bool:
        return self._state.tokens - self._recorded >= RECORD_TOKENS

    def record(self) -> None:
        self._tokens.sync()
        sync(self._starts)
        write_json(self._path, asdict(self._state))
        self._recorded = self._state.tokens


def _finish(
    plan: _Plan, place: Path, state: _State, report: ReadReport, shards: list[tuple[str, int]]
) -> None:
    """Write the index and, last, meta.json, which makes the folder a finished token file."""
    if not state.documents:
        raise DataError(empty_part(plan.sources, report.other_part_documents))
    _write_starts(place, state.documents)
    vocabulary = plan.backend.get_vocab(with_added_tokens=True)
    meta = {
        "format": FORMAT,
        "fingerprint": plan.fingerprint(),
        "tokens": state.tokens,
        "documents": state.documents,
        "shards": shards,
        "vocab_size": max(vocabulary.values()) + 1,
        "prefix": plan.prefix,
        "suffix": plan.suffix,
        "tokenizer": plan.tokenizer_hash(),
        "sources": plan.identities,
        "report": report.to_dict(),
    }
    write_json(place / "meta.json", meta)
    (place / "documents.bin").unlink()
    (place / "progress.json").unlink()


def _write_starts(place: Path, count: int) -> None:
    """Convert documents.bin to documents.npy in pieces, because it may not fit in memory."""
    header = {"descr": _START.str, "fortran_order": False, "shape": (count,)}
    with (place / "documents.bin").open("rb") as old, (place / "documents.npy").open("wb") as new:
        np.lib.format.write_array_header_1_0(new, header)
        shutil.copyfileobj(old, new, 2**20)
        sync(new)
