"""Every readable kind gives the same documents; what is left out is counted by name."""

import bz2
import gzip
import json
import lzma
import os
import tempfile
import threading
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_stable.data import ReadReport, Source, expand, read_documents
from hf_stable.data.opening import is_pipe
from hf_stable.errors import DataError

TEXTS = ["one\nline", "  zwei Wörter ", "三 🙂", "nul \0 byte", "\u2028 odd \r\n ends"]


def read(source, skip=0):
    report = ReadReport()
    return list(read_documents(source, report, skip)), report


def write_json_lines(path, texts, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def write_parquet(path, texts):
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)


def zstd(data):
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as file:
        file.write(data)
    return buffer.getvalue().to_pybytes()


COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
    "zstd": lambda data: zstd(data[:9]) + zstd(data[9:]),
}


def serve_dataset(monkeypatch, rows, streaming):
    data = datasets.Dataset.from_list(rows)
    found = data.to_iterable_dataset() if streaming else data
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet", "dataset", "streamed"])
def test_every_kind_gives_the_same_documents(kind, tmp_path, monkeypatch):
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        write_parquet(path, TEXTS)
    elif kind in ("dataset", "streamed"):
        serve_dataset(monkeypatch, [{"text": text} for text in TEXTS], kind == "streamed")
        path = "somebody/something"
    else:
        write_json_lines(path, TEXTS, gzip.open if kind.endswith("gz") else open)
    documents, report = read(Source(str(path)))
    assert documents == TEXTS
    assert report.documents == len(TEXTS)
    assert report.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert report.bad_documents == report.empty_documents == 0


@pytest.mark.parametrize("suffix", ["txt", "md", "text", "txt.gz"])
def test_text_files_as_one_document(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    text = "first\n\n second \r\nthird"
    with gzip.open(path, "wb") if suffix.endswith("gz") else path.open("wb") as file:
        file.write(b"\xef\xbb\xbf" + text.encode())
    assert read(Source(str(path)))[0] == [text]


def test_lines_and_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n\n \nthree\n four")
    assert read(Source(str(path), sample_by="line"))[0] == ["one", "two", "three", " four"]
    assert read(Source(str(path), sample_by="paragraph"))[0] == ["one\ntwo", "three\n four"]
    assert read(Source(str(path), sample_by="line"))[1].empty[str(path)] == ["line 3", "line 4"]


def test_bad_json_lines_are_counted_with_their_place_and_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b'{"text": "\xff"}',
        b'{"text": null}',
        b'{"text": 3}',
        b'{"body": "other"}',
        b"[1]",
        b'{"text": "\\ud800"}',
        b"",
        b'{"text": " \\n"}',
        b"[" * 100_000,
        b'{"text": "good too"}',
    ]
    path.write_bytes(b"\n".join(lines))
    documents, report = read(Source(str(path), max_bad_share=0.8))
    assert documents == ["good", "good too"]
    assert report.bad_counts == {str(path): 8}
    assert report.empty_counts == {str(path): 2}
    assert report.empty[str(path)] == ["line 9", "line 10"]
    for place, reason in zip(
        report.bad[str(path)], ["JSON", "not UTF-8: 0xff", "null", "int", "'text'"], strict=True
    ):
        assert reason in place
    assert [place.split(":")[0] for place in report.bad[str(path)]] == [
        f"line {n}" for n in (2, 3, 4, 5, 6)
    ]
    assert f"{path}: 8 bad (line 2" in "\n".join(report.lines())


@pytest.mark.parametrize("sample_by", ["document", "line", "paragraph"])
def test_byte_order_marks_of_joined_files_are_no_text(sample_by, tmp_path):
    mark, texts = b"\xef\xbb\xbf", ["one\ufeff two\n", "three\n"]
    lines = [mark + json.dumps({"text": text}).encode() + b"\n" for text in texts]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    documents, report = read(Source(str(tmp_path / "a.jsonl")))
    assert documents == texts and not report.bad
    (tmp_path / "a.txt").write_bytes(b"".join(mark + text.encode() for text in texts))
    documents, _ = read(Source(str(tmp_path / "a.txt"), sample_by=sample_by))
    assert "\n".join(documents).strip() == "one\ufeff two\nthree"


def test_bad_parquet_rows_are_counted(tmp_path):
    path = tmp_path / "a.parquet"
    not_utf8 = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    column = pa.concat_arrays([pa.array(["good", None, ""]), not_utf8, pa.array(["too"])])
    pq.write_table(pa.table({"text": column}), path)
    documents, report = read(Source(str(path)))
    assert documents == ["good", "too"]
    assert [place[:5] for place in report.bad[str(path)]] == ["row 2", "row 4"]
    assert report.empty[str(path)] == ["row 3"]


def test_bad_text_lines_are_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n" * 2000 + b"caf\xe9\nnul \0\n\ngood")
    documents, report = read(Source(str(path), sample_by="line"))
    assert len(documents) == 2001
    assert report.bad[str(path)] == [
        "line 2001: not UTF-8: 0xe9 at byte 4",
        "line 2002: NUL byte at byte 5",
    ]
    documents, report = read(Source(str(path), sample_by="paragraph"))
    assert documents == ["good"]
    assert report.bad[str(path)] == ["line 2001: not UTF-8: 0xe9 at byte 4"]


def unusable_files(folder):
    """File name -> (bytes, words the message must have), of files no document can come from."""
    whole = folder / "whole"
    write_parquet(whole, TEXTS * 50)
    parquet = whole.read_bytes()
    zipped = gzip.compress(b"some text\n" * 5000, mtime=0)
    pq.write_table(pa.table({"body": ["a"]}), whole)
    other = whole.read_bytes()
    pq.write_table(pa.table({"text": [[1, 2]]}), whole)
    lists = whole.read_bytes()
    return {
        "empty.parquet": (b"", "parquet"),
        "binary.txt": (b"\x7fELF\0\0", "NUL"),
        "utf16.txt": ("text".encode("utf-16"), "NUL"),
        "latin.txt": ("caf\u00e9".encode("latin-1"), "UTF-8"),
        "cut.txt.gz": (zipped[: len(zipped) // 2], "truncated"),
        "no.txt.gz": (b"plain text", "gzip"),
        "flipped.jsonl.gz": (zipped[:20] + b"\xff\xff\xff" + zipped[23:], "gzip"),
        "cut.txt.bz2": (bz2.compress(b"text" * 5000)[:30], "truncated"),
        "cut.txt.xz": (lzma.compress(b"text" * 5000)[:50], "truncated"),
        "cut.txt.zst": (zstd(b"text" * 5000)[:20], "truncated"),
        "no.txt.zst": (b"plain text", "zstd"),
        "cut.json": (b'[\n{"text": "a"},\n{"text": "b"},\n{"text": "c"}\n', "array of objects"),
        "bad.jsonl": (b'{"text": 1}\n{"text": 2}', "int"),
        "cut.parquet": (parquet[: len(parquet) // 2], "parquet"),
        "damaged.parquet": (parquet[:4] + b"\xff" * 40 + parquet[44:], "parquet"),
        "column.parquet": (other, "['body']"),
        "lists.parquet": (lists, "list"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "empty.parquet",
        "binary.txt",
        "utf16.txt",
        "latin.txt",
        "cut.txt.gz",
        "no.txt.gz",
        "flipped.jsonl.gz",
        "cut.txt.bz2",
        "cut.txt.xz",
        "cut.txt.zst",
        "no.txt.zst",
        "cut.json",
        "bad.jsonl",
        "cut.parquet",
        "damaged.parquet",
        "column.parquet",
        "lists.parquet",
    ],
)
def test_unusable_files_are_one_clear_error(name, tmp_path):
    content, words = unusable_files(tmp_path)[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(Source(str(path)))
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_document_too_large_to_tokenize_at_once_is_refused_or_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_stable.data.formats.MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr("hf_stable.data.sources.MAX_DOCUMENT_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_text("short\n" + "x" * 101 + "\n" + "y" * 100)
    with pytest.raises(DataError, match=r"a\.txt.*paragraph"):
        read(Source(str(path)))
    documents, report = read(Source(str(path), sample_by="line"))
    assert documents == ["short", "y" * 100]
    assert report.bad[str(path)][0].startswith("line 2: 101 bytes")


def test_expand_sorts_and_names_what_it_does_not_read(tmp_path):
    for name in ("b.txt", "a/c.jsonl", "a/b.parquet", "picture.png", "a/notes.md.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    report = ReadReport()
    found = expand([Source(str(tmp_path), column="body")], report)
    names = ["a/b.parquet", "a/c.jsonl", "a/notes.md.gz", "b.txt"]
    assert found == [Source(str(tmp_path / name), column="body") for name in names]
    assert report.ignored_files == [str(tmp_path / "picture.png")]
    assert "picture.png" in "\n".join(report.lines())
    globbed = expand([Source(str(tmp_path / "**" / "*.txt")), Source("squad")])
    assert globbed == [Source(str(tmp_path / "b.txt")), Source("squad")]


@pytest.mark.parametrize(
    "path", ["none.txt", "no/such/folder", "./none", "*.parquet", "picture.png", "bare", "a b"]
)
def test_a_path_that_matches_nothing_is_an_error(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=path.replace("*", ".")):
        expand([Source(path)])


def test_no_source_at_all_is_an_error():
    with pytest.raises(DataError, match="no data sources"):
        expand([])


@pytest.mark.parametrize(
    "fields",
    [
        {"path": ""},
        {"sample_by": "word"},
        {"part": "test"},
        {"holdout": 0.1},
        {"holdout": 1.0},
        {"max_bad_share": 1.1},
        {"holdout": -0.1},
        {"holdout": float("nan")},
        {"part": "validation"},
    ],
)
def test_impossible_sources_are_refused(fields):
    with pytest.raises(DataError):
        Source(**{"path": "a.txt", **fields})


def test_skip_continues_and_the_report_is_that_of_one_reading(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [f"text {i}" if i % 7 else "" for i in range(100)]
    write_json_lines(path, texts)
    path.write_text(path.read_text() + "broken\n")
    source = Source(str(path), part="train", holdout=0.3)
    whole, report = read(source)
    for skip in (0, 1, len(whole) // 2, len(whole)):
        rest, again = read(source, skip)
        assert rest == whole[skip:]
        assert again == report
    with pytest.raises(DataError, match="changed"):
        read(source, len(whole) + 1)


def test_holdout_parts_a_set_without_overlap_wherever_documents_stand(tmp_path):
    texts = [f"document number {i}" for i in range(2000)]
    path, turned = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_json_lines(path, texts)
    write_json_lines(turned, texts[::-1])
    train, report = read(Source(str(path), part="train", holdout=0.2))
    held_out, _ = read(Source(str(path), part="validation", holdout=0.2))
    assert sorted(train + held_out) == sorted(texts)
    assert report.other_part_documents == len(held_out)
    assert 0.15 < len(held_out) / len(texts) < 0.25
    assert set(read(Source(str(turned), part="validation", holdout=0.2))[0]) == set(held_out)


def test_dataset_with_another_column_or_that_cannot_be_loaded_is_an_error(monkeypatch):
    serve_dataset(monkeypatch, [{"body": "a"}], streaming=False)
    with pytest.raises(DataError, match="body"):
        read(Source("some/set"))

    def fail(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"some/set.*offline"):
        read(Source("some/set"))


def test_report_survives_json():
    report = ReadReport()
    report.add_bad("a", "line 1: x")
    report.add_empty("b", "row 2")
    report.documents = 3
    assert ReadReport(**json.loads(json.dumps(report.to_dict()))) == report


def test_real_parquet_is_read_whole(real_data):
    path = real_data / "english" / "modern_validation.parquet"
    documents, report = read(Source(str(path)))
    assert len(documents) == pq.read_metadata(path).num_rows
    assert not report.problem_lines()


@pytest.mark.parametrize("ending", COMPRESS)
def test_every_compression_gives_the_same_documents(ending, tmp_path):
    plain = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    for name, expected in (("a.ndjson", TEXTS), ("a.txt", [plain.decode()])):
        path = tmp_path / f"{name}.{ending}"
        path.write_bytes(COMPRESS[ending](plain))
        (source,) = expand([Source(str(path))])
        assert read(source)[0] == expected


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_a_json_array_is_read_record_by_record(name, indent, tmp_path):
    path = tmp_path / name
    records = [{"text": text} for text in TEXTS] + [{"text": None}, {"text": ""}]
    data = ("\n " + json.dumps(records, indent=indent)).encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    documents, report = read(Source(str(path)))
    assert documents == TEXTS
    assert report.bad[str(path)] == ["record 6: null"]
    assert report.empty[str(path)] == ["record 7"]


def test_an_array_with_one_record_a_line_is_no_json_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[\n" + ",\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n]\n")
    assert read(Source(str(path)))[0] == TEXTS


def test_a_first_line_that_is_a_list_is_one_bad_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('[1]\n{"text": "a"}\n{"text": "b"}\n')
    documents, report = read(Source(str(path)))
    assert documents == ["a", "b"]
    assert report.bad[str(path)] == ["line 1: list where an object with 'text' is expected"]


def test_more_bad_documents_than_the_allowed_share_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    good, bad = '{"text": "good"}\n', '{"content": "bad"}\n'
    path.write_text(good * 5 + bad * 5 + "\n" * 20)
    assert len(read(Source(str(path)))[0]) == 5
    path.write_text(good * 5 + bad * 6)
    with pytest.raises(DataError, match=r"6 of 11 .*'content'.*max_bad_share"):
        read(Source(str(path)))
    assert len(read(Source(str(path), max_bad_share=0.6))[0]) == 5
    with pytest.raises(DataError, match="6 of 11"):
        read(Source(str(path), max_bad_share=0.0))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz", "b.txt"])
def test_a_file_without_text_is_an_empty_document(name, tmp_path):
    path = tmp_path / name
    content = b" \n" if name == "b.txt" else b""
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    documents, report = read(Source(str(path)))
    assert documents == []
    assert report.empty_counts == {str(path): 1}


def columns_of_text():
    """Kind -> (column, table) with the same text."""
    text = pa.array(TEXTS)
    inner = pa.StructArray.from_arrays([text, pa.array(range(len(TEXTS)))], ["text", "id"])
    other = pa.array(["no"] * len(TEXTS))
    return {
        "dictionary": ("text", {"text": text.dictionary_encode()}),
        "binary": ("text", {"text": text.cast(pa.binary())}),
        "large": ("text", {"text": text.cast(pa.large_string())}),
        "nested": ("content.text", {"other": other, "content": inner}),
        "dotted": ("content.text", {"content.text": text, "content": inner.field(1)}),
    }


@pytest.mark.parametrize("kind", columns_of_text())
def test_text_is_read_in_every_physical_form(kind, tmp_path):
    column, arrays = columns_of_text()[kind]
    table = pa.table(arrays)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "a.arrow", "b.arrow"):
        assert read(Source(str(tmp_path / name), column=column))[0] == TEXTS
    rows = table.cast(pa.schema([(f.name, decoded(f.type)) for f in table.schema])).to_pylist()
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(Source(str(tmp_path / "a.jsonl"), column=column))[0] == TEXTS


def decoded(kind):
    is_text = pa.types.is_dictionary(kind) or pa.types.is_binary(kind)
    return pa.string() if is_text else kind


def test_a_field_of_nothing_and_bytes_that_are_no_text_are_bad_rows(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"a": {"b": b"good"}}, {"a": None}, {"a": {"b": b"\xff"}}, {"a": {"b": b"too"}}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    documents, report = read(Source(str(path), column="a.b"))
    assert documents == ["good", "too"]
    assert report.bad[str(path)] == ["row 2: null", "row 3: not UTF-8: 0xff at byte 1"]


def test_two_columns_of_one_name_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"a\.parquet has 2 columns with the name 'text'"):
        read(Source(str(path)))


@pytest.mark.parametrize("lines", [["plain\n", "text"], ['{"text": "plain\\ntext"}\n']])
def test_a_pipe_is_read_as_text_or_json(lines, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("".join(lines),))
    writer.start()
    (source,) = expand([Source(str(path))])
    assert read(source)[0] == ["plain\ntext"]
    writer.join()


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("a.jsonl", {"split": "test"}, "split 'test' has no effect"),
        ("a.jsonl", {"name": "x"}, "name 'x' has no effect"),
        ("a.parquet", {"split": "train"}, "split 'train' has no effect"),
        ("*.txt", {"streaming": False}, "streaming False has no effect"),
        ("a.txt", {"column": "body"}, "column 'body' has no effect"),
        ("a.jsonl", {"sample_by": "line"}, "sample_by 'line' has no effect"),
        ("a.parquet", {"sample_by": "paragraph"}, "sample_by 'paragraph' has no effect"),
        ("org/name", {"sample_by": "line"}, "sample_by 'line' has no effect"),
    ],
)
def test_options_without_effect_are_refused(name, fields, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("a.jsonl", "a.parquet", "a.txt"):
        (tmp_path / file).write_text("x")
    with pytest.raises(DataError, match=words):
        expand([Source(name, **fields)])
    useful = {"column": "a.jsonl", "sample_by": "a.txt"}.get(next(iter(fields)), "org/name")
    both = [Source(name, **fields), Source(useful, **fields)]
    assert len(expand(both, shared_options=True)) == 2


@pytest.mark.parametrize("path", ["https://host/a.txt", "hf://datasets/a/b", "s3://b/a.jsonl"])
def test_a_url_is_refused_for_what_it_is(path):
    with pytest.raises(DataError, match="is a URL"):
        expand([Source(path)])


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory")
def test_a_file_in_memory_is_no_pipe() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm", suffix=".txt") as file:
        assert not is_pipe(Path(file.name))
