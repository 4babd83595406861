"""A folder that is a dataset is read as `datasets` reads it, one split at a time."""

import datasets
import pytest

from hf_stable.data import ReadReport, Source, expand, has_splits, read_documents
from hf_stable.errors import DataError

SPLITS = {"train": ["one", "two", "three"], "test": ["four"]}
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/part-a.parquet}
  - {split: test, path: data/part-b.parquet}
---
# card
"""


def table(texts):
    return datasets.Dataset.from_dict({"text": texts})


def write(kind, folder):
    folder.mkdir()
    if kind == "saved":
        datasets.DatasetDict({name: table(texts) for name, texts in SPLITS.items()}).save_to_disk(
            folder
        )
        return
    names = {
        "card": ["data/part-a", "data/part-b"],
        "shards": [f"data/{split}-00000-of-00001" for split in SPLITS],
        "bare": [f"{split}-00000-of-00001" for split in SPLITS],
        "info": ["train", "test"],
    }[kind]
    for name, texts in zip(names, SPLITS.values(), strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        table(texts).to_parquet(folder / f"{name}.parquet")
    if kind != "bare":
        (folder / "README.md").write_text(CARD if kind == "card" else "# card")
    if kind == "info":
        (folder / "dataset_infos.json").write_text("{}")


def read(source, report=None):
    report = ReadReport() if report is None else report
    return [text for each in expand([source], report) for text in read_documents(each, report)]


@pytest.mark.parametrize("kind", ["card", "shards", "bare", "info", "saved"])
def test_splits_of_a_dataset_folder_are_honored(kind, tmp_path):
    folder = tmp_path / "data set"
    write(kind, folder)
    assert has_splits(str(folder))
    report = ReadReport()
    assert read(Source(str(folder), split="test"), report) == SPLITS["test"]
    left = [path for paths in report.left_files.values() for path in paths]
    assert any("part-a" in path or "train" in path for path in left)
    assert read(Source(str(folder), split="train")) == read(Source(str(folder))) == SPLITS["train"]
    with pytest.raises(DataError, match=r"split 'nope'.*\['test', 'train'\]"):
        expand([Source(str(folder), split="nope")])
    with pytest.raises(DataError, match="streaming"):
        expand([Source(str(folder), streaming=False)])
    with pytest.raises(DataError, match=r"data set|name"):
        expand([Source(str(folder), name="nope")])
    with pytest.raises(DataError, match="data set inside"):
        expand([Source(str(tmp_path))])


def test_paths_of_a_dataset_folder_are_as_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("shards", tmp_path / "set")
    (source,) = expand([Source("set", split="test")])
    assert source == Source("set/data/test-00000-of-00001.parquet")


def test_a_saved_table_is_read_and_has_no_splits(tmp_path):
    folder = tmp_path / "table"
    table(SPLITS["train"]).save_to_disk(folder)
    assert not has_splits(str(folder))
    assert read(Source(str(folder))) == read(Source(str(tmp_path))) == SPLITS["train"]
    with pytest.raises(DataError, match="split 'train' has no effect"):
        expand([Source(str(folder), split="train")])


def test_a_folder_of_plain_files_is_no_dataset(tmp_path):
    (tmp_path / "README.md").write_text("---\ntitle: notes\n---\ntext")
    (tmp_path / "train.txt").write_text("text")
    assert not has_splits(str(tmp_path))
    assert len(expand([Source(str(tmp_path))])) == 2


def test_files_of_a_split_that_cannot_be_read_are_an_error(tmp_path):
    folder = tmp_path / "set"
    write("card", folder)
    (folder / "README.md").write_text(CARD.replace("part-b.parquet", "b.csv"))
    (folder / "data" / "b.csv").write_text("text\nfour\n")
    with pytest.raises(DataError, match=r"b\.csv|csv"):
        expand([Source(str(folder), split="test")])
