"""A token file depends on its inputs alone, however often its build dies, also by SIGKILL."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_stable.data import (
    ReadReport,
    Source,
    TokenFile,
    build_token_file,
    building,
    expand,
    load_tokenizer,
    read_documents,
    shards,
    streams,
)
from hf_stable.errors import DataError
from tests.data.conftest import make_texts, write_sources


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(building, "BATCH_BYTES", 2000)
    monkeypatch.setattr(building, "RECORD_TOKENS", 1500)
    monkeypatch.setattr(building, "SHARD_TOKENS", 4000)


def contents(file: TokenFile) -> dict[str, bytes]:
    shards = [name for name, _ in file.meta["shards"]]
    assert {path.name for path in file.folder.iterdir()} == {*shards, "documents.npy", "meta.json"}
    return {path.name: path.read_bytes() for path in file.folder.iterdir()}


def all_tokens(found: dict[str, bytes]) -> bytes:
    return b"".join(found[name] for name in sorted(found) if name.startswith("tokens-"))


def test_documents_come_back_from_the_file(sources, bpe, tmp_path):
    file = build_token_file(sources, bpe, tmp_path / "cache", progress=False)
    eot = bpe.eos_token_id
    ends = [*file.document_starts[1:], file.num_tokens]
    found = []
    for start, end in zip(file.document_starts, ends, strict=True):
        assert file.tokens[start] == eot
        assert eot not in file.tokens[start + 1 : end]
        found.append(bpe.decode(file.tokens[start + 1 : end].tolist()))
    read = [list(read_documents(source, ReadReport())) for source in expand(sources)]
    assert found == [text for documents in read for text in documents]
    report = file.meta["report"]
    assert file.num_documents == report["documents"] == len(found)
    assert report["bad_counts"] == {sources[0].path: 2, sources[2].path: 1}
    assert report["empty_counts"] == {sources[0].path: 1}
    assert [Path(name).name for name in report["ignored_files"]] == ["picture.png"]
    assert file.vocab_size == len(bpe)


def test_text_that_spells_special_tokens_makes_no_boundary(bpe, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one <|endoftext|> two <|padding|>")
    file = build_token_file([Source(str(path))], bpe, tmp_path / "cache", progress=False)
    assert (file.tokens[:] == bpe.eos_token_id).nonzero()[0].tolist() == [0]
    assert bpe.decode(file.tokens[1:].tolist()) == path.read_text()


def test_a_tokenizer_that_was_told_to_cut_and_pad_changes_nothing(sources, bpe_folder, tmp_path):
    tokenizer = load_tokenizer(bpe_folder)
    whole = build_token_file(sources, tokenizer, tmp_path / "one", progress=False)
    tokenizer(["a b c d", "a"], truncation=True, max_length=2, padding="max_length")
    again = build_token_file(sources, tokenizer, tmp_path / "two", progress=False)
    assert contents(whole) == contents(again)


def test_what_is_left_out_is_printed_though_progress_is_off(sources, bpe, tmp_path, capsys):
    build_token_file(sources, bpe, tmp_path / "cache", progress=False)
    said = capsys.readouterr().err
    for words in ("a.jsonl: 2 bad (line 8: not one JSON", "a.jsonl: 1 empty", "picture.png"):
        assert words in said
    build_token_file(sources, bpe, tmp_path / "cache", progress=True)
    assert "using" in capsys.readouterr().err


class CrashError(Exception):
    """The injected end of a build."""


def crash_at(monkeypatch, call: int) -> None:
    """Let the build die at its `call`-th step, counted where it tokenizes or touches the disk."""
    left = [call]

    def dying(function):
        def wrapped(*arguments, **keywords):
            left[0] -= 1
            if left[0] < 0:
                raise CrashError
            return function(*arguments, **keywords)

        return wrapped

    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(building, "write_json", dying(building.write_json))
    monkeypatch.setattr(building._Writer, "write", dying(building._Writer.write))
    monkeypatch.setattr(shards, "open_at", dying(shards.open_at))
    monkeypatch.setattr(building, "_write_starts", dying(building._write_starts))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))


def test_killed_anywhere_and_resumed_gives_the_same_bytes(bpe, tmp_path, monkeypatch, small_steps):
    sources = write_sources(tmp_path / "texts", 120)
    expected = contents(build_token_file(sources, bpe, tmp_path / "whole", progress=False))
    for call in range(1000):
        folder = tmp_path / f"at_{call}"
        with monkeypatch.context() as patch:
            crash_at(patch, call)
            try:
                build_token_file(sources, bpe, folder, progress=False)
            except CrashError:
                pass
            else:
                break
        # What a dying machine may leave behind the last record.
        last = sorted(folder.glob("*/tokens-*.bin"))[-1:]
        for path in (*last, *folder.glob("*/documents.bin")):
            if not (path.parent / "meta.json").exists():
                with path.open("ab") as file:
                    file.write(b"garbage")
        file = build_token_file(sources, bpe, folder, progress=False)
        assert {name: (file.folder / name).read_bytes() for name in expected} == expected, call
    # Each record is three steps; a build that makes few of them would prove little.
    assert call > 40


def test_killed_again_and_again_gives_the_same_bytes(
    sources, bpe, tmp_path, monkeypatch, small_steps
):
    expected = contents(build_token_file(sources, bpe, tmp_path / "whole", progress=False))
    for _ in range(100):
        with monkeypatch.context() as patch:
            crash_at(patch, 11)
            try:
                file = build_token_file(sources, bpe, tmp_path / "cache", progress=False)
                break
            except CrashError:
                continue
    assert {name: (file.folder / name).read_bytes() for name in expected} == expected


CHILD = """
import sys, time
from pathlib import Path
from tests.data.conftest import write_sources
from hf_stable.data import build_token_file, building, load_tokenizer
building.BATCH_BYTES, building.RECORD_TOKENS, building.SHARD_TOKENS = 2000, 1500, 4000
write = building._Writer.write
def slow(*arguments):
    time.sleep(0.05)
    write(*arguments)
building._Writer.write = slow
sources = write_sources(Path(sys.argv[1]))
build_token_file(sources, load_tokenizer(sys.argv[2]), sys.argv[3], progress=False)
"""


def test_a_real_kill_leaves_a_build_that_goes_on(tmp_path, bpe, bpe_folder, small_steps, capsys):
    sources = write_sources(tmp_path / "texts")
    expected = contents(build_token_file(sources, bpe, tmp_path / "whole", progress=False))
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", CHILD, *map(str, (tmp_path / "texts", bpe_folder, cache))]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(cache.glob("*/progress.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.12)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not list(cache.glob("*/meta.json"))
    capsys.readouterr()
    file = build_token_file(sources, bpe, cache, progress=False)
    assert "resuming" in capsys.readouterr().err
    assert file.num_documents == len(file.document_starts)
    found = contents(file)
    assert found.keys() == expected.keys()
    assert len(found) > 4
    assert all(found[name] == expected[name] for name in expected if name != "meta.json")
    assert file.meta["report"] == json.loads(expected["meta.json"])["report"]


def test_two_builders_at_once_make_one_good_file(sources, bpe, tmp_path, small_steps):
    expected = contents(build_token_file(sources, bpe, tmp_path / "whole", progress=False))
    found = []

    def build():
        found.append(build_token_file(sources, bpe, tmp_path / "cache", progress=False))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [contents(file) for file in found] == [expected] * 3


def test_the_fingerprint_depends_on_content_and_choices_but_not_on_place_or_time(
    sources, bpe, tmp_path, monkeypatch
):
    def fingerprint(changed, folder="cache"):
        return build_token_file(changed, bpe, tmp_path / folder, progress=False).fingerprint

    first = fingerprint(sources)
    elsewhere = write_sources(tmp_path / "other" / "place")
    os.utime(elsewhere[0].path, (0, 0))
    assert fingerprint(elsewhere, "another_cache") == first
    monkeypatch.chdir(tmp_path)
    assert fingerprint(write_sources(Path("texts"))) == first

    path = Path(elsewhere[2].path)
    path.write_text(path.read_text().replace("fox", "cat"))
    holdout = Source(sources[0].path, part="train", holdout=0.2)
    prints = {
        first,
        fingerprint(elsewhere),
        fingerprint(sources[::-1]),
        fingerprint(sources[:2]),
        fingerprint([holdout, *sources[1:]]),
        fingerprint([sources[0], Source(sources[1].path), sources[2]]),
    }
    assert len(prints) == 6


def test_a_finished_file_is_used_again(sources, bpe, tmp_path, monkeypatch):
    first = build_token_file(sources, bpe, tmp_path / "cache", progress=False)

    def refuse(*_, **__):
        raise AssertionError("read again")

    monkeypatch.setattr(building, "read_documents", refuse)
    monkeypatch.setattr("hf_stable.data.identity._hash", refuse)
    assert build_token_file(sources, bpe, tmp_path / "cache", progress=False).folder == first.folder


def test_shards_are_the_tokens_of_one_file_cut_at_equal_lengths(
    sources, bpe, tmp_path, monkeypatch
):
    whole = build_token_file(sources, bpe, tmp_path / "whole", progress=False)
    monkeypatch.setattr(building, "SHARD_TOKENS", 1000)
    cut = build_token_file(sources, bpe, tmp_path / "cut", progress=False)
    assert cut.fingerprint == whole.fingerprint
    assert len(whole.meta["shards"]) == 1
    lengths = [length for _, length in cut.meta["shards"]]
    assert len(lengths) > 5
    assert lengths[:-1] == [1000] * (len(lengths) - 1)
    assert 0 < lengths[-1] <= 1000
    assert all_tokens(contents(cut)) == all_tokens(contents(whole))
    assert np.array_equal(cut.document_starts, whole.document_starts)


def test_a_whole_number_of_shards_leaves_no_empty_one(bpe, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one two three")
    whole = build_token_file([Source(str(path))], bpe, tmp_path / "whole", progress=False)
    monkeypatch.setattr(building, "SHARD_TOKENS", whole.num_tokens)
    again = build_token_file([Source(str(path))], bpe, tmp_path / "again", progress=False)
    assert contents(again) == contents(whole)


def test_what_changed_after_a_kill_is_built_anew(bpe, tmp_path, monkeypatch, small_steps):
    sources = write_sources(tmp_path / "texts", 120)
    with monkeypatch.context() as patch:
        crash_at(patch, 30)
        with pytest.raises(CrashError):
            build_token_file(sources, bpe, tmp_path / "cache", progress=False)
    (old,) = (path.parent for path in (tmp_path / "cache").glob("*/progress.json"))
    path = Path(sources[0].path)
    path.write_text(path.read_text().replace("fox", "cat"))
    built = build_token_file(sources, bpe, tmp_path / "cache", progress=False)
    assert built.folder != old
    expected = build_token_file(sources, bpe, tmp_path / "whole", progress=False)
    assert all_tokens(contents(built)) == all_tokens(contents(expected))


def test_a_file_that_changes_while_it_is_read_is_refused(sources, bpe, tmp_path, monkeypatch):
    path, write = Path(sources[0].path), building._Writer.write

    def meddling(*arguments):
        path.write_text(path.read_text() + json.dumps({"text": "more"}))
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(building._Writer, "write", meddling)
        with pytest.raises(DataError, match=r"a\.jsonl changed while"):
            build_token_file(sources, bpe, tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").glob("*/meta.json"))
    again = build_token_file(sources, bpe, tmp_path / "cache", progress=False)
    expected = build_token_file(sources, bpe, tmp_path / "whole", progress=False)
    assert all_tokens(contents(again)) == all_tokens(contents(expected))


class Builder:
    """What `datasets.load_dataset_builder` gives, as far as it is read."""

    config = datasets.BuilderConfig(name="default", version="0.0.0")

    def __init__(self, revision):
        self.hash = revision


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_built_resumed_and_known_by_its_revision(
    bpe, tmp_path, monkeypatch, small_steps, streaming
):
    rows = datasets.Dataset.from_list([{"text": text} for text in make_texts(100)])
    served = rows.to_iterable_dataset() if streaming else rows
    source = Source("somebody/something", streaming=streaming)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: served)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: Builder("first"))
    whole = build_token_file([source], bpe, tmp_path / "whole", progress=False)
    assert whole.num_documents == 100
    with monkeypatch.context() as patch:
        crash_at(patch, 12)
        with pytest.raises(CrashError):
            build_token_file([source], bpe, tmp_path / "cache", progress=False)
    again = build_token_file([source], bpe, tmp_path / "cache", progress=False)
    assert contents(again) == contents(whole)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: Builder("second"))
    other = build_token_file([source], bpe, tmp_path / "cache", progress=False)
    assert other.fingerprint != whole.fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_files_goes_on_at_its_row(bpe, tmp_path, monkeypatch, small_steps, streaming):
    texts, load = make_texts(150), datasets.load_dataset
    files = [str(tmp_path / f"{part}.parquet") for part in range(3)]
    for part, file in enumerate(files):
        rows = [{"text": text} for text in texts[50 * part : 50 * part + 50]]
        rows[7:7] = [{"text": ""}, {"text": None}]
        datasets.Dataset.from_list(rows).to_parquet(file)

    def from_files(*_, **__):
        cache = str(tmp_path / "datasets")
        options = {"data_files": files, "split": "train", "cache_dir": cache}
        return load("parquet", streaming=streaming, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_files)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: Builder("first"))
    source, read = Source("somebody/something", streaming=streaming), []
    check = streams.check_record

    def counting(number, *arguments):
        read.append(number)
        return check(number, *arguments)

    monkeypatch.setattr(streams, "check_record", counting)
    expected = contents(build_token_file([source], bpe, tmp_path / "whole", progress=False))
    assert read == list(range(1, 157))
    resumed = []
    for call in (10, 17, 24):
        folder = tmp_path / f"at_{call}"
        with monkeypatch.context() as patch:
            crash_at(patch, call)
            with pytest.raises(CrashError):
                build_token_file([source], bpe, folder, progress=False)
        read.clear()
        file = build_token_file([source], bpe, folder, progress=False)
        assert {name: (file.folder / name).read_bytes() for name in expected} == expected
        assert read == list(range(read[0], 157))
        resumed.append(read[0])
    # The first file has 52 rows.
    assert 1 < resumed[0] < 52 < resumed[-1]


def test_a_set_without_documents_is_an_error_with_the_remedy(bpe, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("only one document")
    for part in ("train", "validation"):
        source = Source(str(path), part=part, holdout=0.5)
        try:
            build_token_file([source], bpe, tmp_path / "cache", progress=False)
        except DataError as error:
            assert "holdout" in str(error)
            assert str(path) in str(error)
            break
    else:
        pytest.fail("both parts of one document hold it")


def test_a_tokenizer_without_fast_backend_is_refused(sources, tmp_path):
    class Slow:
        name_or_path = "slow"

    with pytest.raises(DataError, match="fast"):
        build_token_file(sources, Slow(), tmp_path / "cache", progress=False)


def test_a_damaged_record_of_a_build_is_told(sources, bpe, tmp_path, monkeypatch, small_steps):
    with monkeypatch.context() as patch:
        crash_at(patch, 20)
        with pytest.raises(CrashError):
            build_token_file(sources, bpe, tmp_path / "cache", progress=False)
    (place,) = (path.parent for path in (tmp_path / "cache").glob("*/tokens-00000.bin"))
    (place / "tokens-00000.bin").write_bytes(b"")
    with pytest.raises(DataError, match="run again"):
        build_token_file(sources, bpe, tmp_path / "cache", progress=False)
    shutil.rmtree(place)
    build_token_file(sources, bpe, tmp_path / "cache", progress=False)
