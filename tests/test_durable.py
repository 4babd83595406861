"""The one way of writing: old or new, whole, whenever the process dies or the disk is full."""

import errno
import shutil
from functools import partial
from pathlib import Path

import pytest

from hf_stable import durable

from .checkpoints.faults import calls_of, die_at, fail_at


def fill(folder: Path, text: str) -> None:
    """Two files, one of them in a folder."""
    (folder / "inner").mkdir()
    for name in ("a", "inner/b"):
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


OLD, NEW = ({"a": text, "inner/b": text} for text in ("old", "new"))


def replace(folder: Path, text: str = "new") -> None:
    with durable.whole_folder(folder) as fresh:
        fill(fresh, text)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with old content."""
    replace(tmp_path / "first" / "model", "old")
    return tmp_path / "first" / "model"


def test_a_killed_replacement_of_a_folder_loses_neither(place: Path, tmp_path: Path) -> None:
    total = len(calls_of(partial(replace, place)))
    shutil.rmtree(place.parent)
    seen = []
    for number in range(1, total + 1):
        folder = tmp_path / str(number) / "model"
        replace(folder, "old")
        assert die_at(partial(replace, folder), number)
        seen.append(content(folder))
        assert seen[-1] in (OLD, NEW, {})
        if not seen[-1]:  # neither has the name yet
            assert content(folder.with_name(".old-model")) == OLD
        with pytest.raises(ZeroDivisionError), durable.whole_folder(folder):
            _ = 1 / 0
        assert content(folder) == (seen[-1] or OLD)
        durable.remove_remains(folder)
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert [now for now in (OLD, {}, NEW) if now in seen] == [OLD, {}, NEW]
    assert seen.count({}) == 1  # between two renames


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(place: Path) -> None:
    total = len(calls_of(partial(replace, place)))
    replace(place, "old")
    failures = 0
    for number in range(1, total + 1):
        error = fail_at(partial(replace, place), number)
        if error is not None:
            failures += 1
            assert isinstance(error, OSError) and error.errno == errno.ENOSPC
        durable.remove_remains(place)
        if place.exists():
            assert content(place) in (OLD, NEW)
        else:
            assert content(place.with_name(".old-model")) == OLD
        replace(place, "old")
        assert [path.name for path in place.parent.iterdir()] == ["model"]
    assert failures > 10


def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(place: Path) -> None:
    calls = calls_of(partial(replace, place))
    first = calls.index("replace")
    assert calls[:first].count("fsync") == 4  # two files, two folders
    assert calls[first:].count("fsync") == 1  # their names
    assert "write" not in calls[first:]


def test_a_folder_with_something_in_it_is_replaced_only_if_told(place: Path) -> None:
    with pytest.raises(OSError, match="not empty"), durable.whole_folder(place, replace=False):
        pass
    assert content(place) == OLD
    assert [path.name for path in place.parent.iterdir()] == ["model"]
    shutil.rmtree(place)
    place.mkdir()
    with durable.whole_folder(place, replace=False) as fresh:
        fill(fresh, "new")
    assert content(place) == NEW


def test_a_killed_write_of_a_file_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    place = tmp_path / "file.json"

    def write(text: bytes = b"new") -> None:
        durable.write_file(place, text)

    write(b"old")
    total, seen = len(calls_of(write)), []
    for number in range(1, total + 1):
        write(b"old")
        assert die_at(write, number)
        seen.append(place.read_bytes())
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {b"old", b"new"}


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "file.json"
    total = len(calls_of(partial(durable.write_file, place, b"old")))
    errors = [fail_at(partial(durable.write_file, place, b"new"), n) for n in range(1, total + 1)]
    assert place.read_bytes() in (b"old", b"new")
    assert sum(error is not None for error in errors) >= 5
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
