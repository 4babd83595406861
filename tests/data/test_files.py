"""A folder or glob stands for all its files; whatever is not read is named."""

import os
from itertools import chain

import pytest

from hf_stable.data import ReadReport, Source, expand
from hf_stable.data.files import DANGLING, FOLDER, HIDDEN, REPEATED
from hf_stable.errors import DataError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def found(path, top):
    report = ReadReport()
    sources = expand([Source(str(path))], report)
    left = {
        reason: [os.path.relpath(each, top) for each in paths]
        for reason, paths in report.left_files.items()
    }
    return [os.path.relpath(source.path, top) for source in sources], left


@pytest.fixture
def linked(tmp_path):
    """A folder with links to a folder, to a file, to nothing, and to folders it has already."""
    top = tmp_path / "texts"
    make(tmp_path, "texts/a.txt", "texts/real/b.txt", "elsewhere/c.txt", "elsewhere/deep/d.txt")
    (top / "linked").symlink_to("../elsewhere")
    (top / "file.txt").symlink_to("a.txt")
    (top / "nothing.txt").symlink_to("nowhere")
    (top / "again").symlink_to("real")
    (top / "real" / "loop").symlink_to("..")
    (tmp_path / "elsewhere" / "up").symlink_to("..")
    return top


READ = ["a.txt", "file.txt", "linked/c.txt", "linked/deep/d.txt", "real/b.txt"]


@pytest.mark.parametrize("glob", ["", "**/*.txt", "**", "**/**/*.txt"])
def test_links_are_followed_and_each_folder_is_read_once(linked, glob):
    files, left = found(linked / glob, linked)
    assert files == READ
    assert left[DANGLING] == ["nothing.txt"]
    assert sorted(left[REPEATED]) == ["again", "linked/up", "real/loop"]


def test_a_folder_that_is_a_link_is_read(linked, tmp_path):
    assert found(linked / "linked", linked)[0] == ["linked/c.txt", "linked/deep/d.txt"]
    assert found(linked / "*" / "*.txt", linked)[0][-2:] == ["linked/c.txt", "real/b.txt"]
    with pytest.raises(DataError, match=r"nothing\.txt is a link to nowhere"):
        expand([Source(str(linked / "nothing.txt"))])


def test_hidden_files_are_named_and_read_only_when_asked_for(tmp_path):
    make(tmp_path, "a.txt", "._a.txt", ".git/b.txt", "__MACOSX/c.txt", "d/.e.txt", "d/__f.txt")
    for path in (tmp_path, tmp_path / "**" / "*.txt"):
        files, left = found(path, tmp_path)
        assert files == ["a.txt", "d/__f.txt"]
        assert sorted(left[HIDDEN]) == ["._a.txt", ".git", "__MACOSX", "d/.e.txt"]
    assert found(tmp_path / "*.txt", tmp_path) == (["a.txt"], {HIDDEN: ["._a.txt"]})
    for path in (tmp_path / ".git", tmp_path / ".git" / "**", tmp_path / "**" / ".git" / "*"):
        assert found(path, tmp_path)[0] == [".git/b.txt"]
    assert found(tmp_path / "**" / ".*.txt", tmp_path)[0] == ["._a.txt", "d/.e.txt"]


def test_folders_that_a_glob_matches_are_named(tmp_path):
    make(tmp_path, "a.txt", "sub/b.txt")
    assert found(tmp_path / "*", tmp_path) == (["a.txt"], {FOLDER: ["sub"]})
    assert found(tmp_path / "**", tmp_path) == (["a.txt", "sub/b.txt"], {})


def test_all_that_is_in_a_folder_is_read_or_named(linked):
    make(linked, ".hidden.txt", "picture.png")
    report = ReadReport()
    sources = expand([Source(str(linked))], report)
    named = {*(source.path for source in sources), *report.ignored_files}
    named |= {*chain(*report.left_files.values())}
    for path in linked.rglob("*"):
        assert str(path) in named or path.is_dir()
    assert "picture.png" in "\n".join(report.lines())
    assert ".hidden.txt" in "\n".join(report.lines())


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "closed/b.txt")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match="closed cannot be listed: Permission denied"):
        expand([Source(str(tmp_path))])
