"""The atomic directory, at every system call at which a process can die or a disk be full."""

import errno
import json
import os
import resource
import signal
from functools import partial
from pathlib import Path

import pytest

from hf_stable.checkpoints import directory
from hf_stable.checkpoints.directory import (
    abandon,
    checkpoints_in,
    commit,
    folder_of,
    newest_good,
    prune,
    quarantine,
    remove_litter,
    verify,
)
from hf_stable.errors import CheckpointError

from .faults import calls_of, die_at, fail_at

FILES = ["state.json", "model/weights.bin", "model/config.json"]


def _content(step: int, name: str) -> bytes:
    return f"{name} of {step};".encode() * 3000


def _write(step: int, folder: Path) -> None:
    """Files in two halves each, so that a process can die between them."""
    (folder / "model").mkdir()
    for name in FILES:
        half = len(_content(step, name)) // 2
        with (folder / name).open("wb") as file:
            file.write(_content(step, name)[:half])
            file.flush()
            file.write(_content(step, name)[half:])


def _save(parent: Path, step: int) -> Path:
    return commit(parent, step, partial(_write, step))


def _is(folder: Path | None, step: int) -> bool:
    return folder == folder_of(folder.parent, step) and all(
        (folder / name).read_bytes() == _content(step, name) for name in FILES
    )


def _restart(parent: Path) -> Path | None:
    """What the next start does; there must be nothing to complain about."""
    remove_litter(parent)
    found = newest_good(parent, pytest.fail)
    assert all(path in checkpoints_in(parent) for path in parent.iterdir())
    return found


def test_a_kill_at_every_call_of_a_save_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    def save(parent: Path) -> None:
        _save(parent, 20)
        prune(parent, 1, 0)

    whole = tmp_path / "whole"
    _save(whole, 10)
    total = len(calls_of(lambda: save(whole)))
    assert total > 30
    found = []
    for number in range(1, total + 2):
        parent = tmp_path / str(number)
        _save(parent, 10)
        assert die_at(partial(save, parent), number) == (number <= total)
        newest = _restart(parent)
        assert _is(newest, 10) or _is(newest, 20), number
        found.append(directory.step_of(newest))
        save(parent)  # the run goes on from there
        assert [path.name for path in checkpoints_in(parent)] == ["step-00000020"]
        assert _is(newest_good(parent, pytest.fail), 20)
    assert found == sorted(found)
    assert set(found) == {10, 20}


def test_a_kill_at_every_call_of_deleting_leaves_whole_checkpoints(tmp_path: Path) -> None:
    def fill(parent: Path) -> None:
        for step in (10, 20, 30, 40):
            _save(parent, step)

    for name, action, left in (
        ("prune", lambda parent: prune(parent, 1, 20), {20, 40}),
        ("abandon", lambda parent: abandon(parent, 10), {10}),
    ):
        whole = tmp_path / name
        fill(whole)
        total = len(calls_of(partial(action, whole)))
        assert {directory.step_of(path) for path in checkpoints_in(whole)} == left
        for number in range(1, total + 1):
            parent = tmp_path / f"{name}-{number}"
            fill(parent)
            assert die_at(partial(action, parent), number)
            newest = _restart(parent)
            assert newest is not None and (name == "abandon" or _is(newest, 40))
            assert all(verify(path) is None for path in checkpoints_in(parent))
            action(parent)
            assert {directory.step_of(path) for path in checkpoints_in(parent)} == left


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_after(
    tmp_path: Path, monkeypatch
) -> None:
    """A power cut may lose what was not synced; a kill does not show it."""
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        real(descriptor)

    def replace(path: Path, target: Path) -> Path:
        synced.append("rename")
        os.replace(path, target)
        return target

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    folder = _save(tmp_path, 10)
    new = ".tmp-" + folder.name
    files = [f"{new}/{name}" for name in sorted(FILES)]
    assert synced == [*files, f"{new}/model", f"{new}/manifest.json", new, "rename", "."]


def test_a_full_disk_at_every_call_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    _save(tmp_path / "whole", 10)
    number, failures = 0, 0
    while True:
        number += 1
        parent = tmp_path / str(number)
        _save(parent, 10)
        error = fail_at(partial(_save, parent, 20), number)
        if error is None:
            break
        assert isinstance(error, OSError)
        failures += 1
        newest = _restart(parent)
        assert _is(newest, 10) or _is(newest, 20)
        assert _is(_save(parent, 20), 20)  # space again
    assert failures > 20


def test_a_file_limit_at_every_size_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """The same by the system's own refusal, which comes in the middle of a write."""
    largest = max(len(_content(20, name)) for name in FILES)
    for limit in (*range(0, largest, 8000), largest - 1):
        parent = tmp_path / str(limit)
        _save(parent, 10)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                _save(parent, 20)
            except OSError:
                os._exit(3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert list(parent.iterdir()) == [folder_of(parent, 10)]
        assert _is(_restart(parent), 10)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _link(path: Path) -> None:
    other = path.with_name("elsewhere")
    path.rename(other)
    path.symlink_to(other)


DAMAGES = [_truncate, _flip, _zero, _link, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_any_damage_is_found_named_and_the_one_before_used(
    tmp_path: Path, name: str, damage
) -> None:
    for step in (10, 20, 30):
        _save(tmp_path, step)
    for step in (20, 30):
        damage(folder_of(tmp_path, step) / name)
    told: list[str] = []
    assert _is(newest_good(tmp_path, told.append), 10)
    assert [line.split()[1] for line in told] == ["step-00000030", "step-00000020"]
    assert all(Path(name).name in line for line in told)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("step-00000010", "bad-step-00000020", "bad-step-00000030")
    }
    assert Path(name).name in (tmp_path / "bad-step-00000030" / "why.txt").read_text()
    assert _is(newest_good(tmp_path, pytest.fail), 10)  # told once
    _save(tmp_path, 20)
    _flip(folder_of(tmp_path, 20) / FILES[0])
    assert _is(_save(tmp_path, 20), 20)  # a step whose folder is bad is saved again
    assert (tmp_path / "bad-step-00000020-2").is_dir()
    damage(folder_of(tmp_path, 10) / name)
    assert _is(newest_good(tmp_path, pytest.fail), 20)
    with pytest.raises(CheckpointError, match="no good checkpoint: bad-step-00000010"):
        newest_good(tmp_path, told.append, at_most=15)


def test_all_bad_is_an_error_now_and_at_the_next_start(tmp_path: Path) -> None:
    assert newest_good(tmp_path, pytest.fail) is None  # there never was one
    _truncate(_save(tmp_path, 10) / FILES[0])
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no good checkpoint: bad-step-00000010.*delete"):
            newest_good(tmp_path, lambda line: None)


def test_a_good_checkpoint_is_never_written_again(tmp_path: Path) -> None:
    before = _save(tmp_path, 10).stat()
    assert commit(tmp_path, 10, lambda folder: pytest.fail("written again")).stat() == before


@pytest.mark.parametrize(
    "name",
    [
        *("../secret", "/etc/passwd", "model/../../secret", "a//b", "./a", "", "C:\\a", "a\\b"),
        *("a:b", "model/", "a\0b", "model"),
    ],
)
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("not ours")
    folder = _save(tmp_path / "checkpoints", 10)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = directory.sync_files(tmp_path, ["secret"])
    manifest["files"][name] = files["secret"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    problem = verify(folder)
    assert problem is not None
    assert "is no path inside" in problem or "is no file" in problem


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"format": 1, "step": 10}', "[" * 100_000, '{"format": 2}', "\xff"]
)
def test_what_is_no_manifest_is_bad_and_nothing_worse(tmp_path: Path, text: str) -> None:
    folder = _save(tmp_path, 10)
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    assert "manifest.json" in (verify(folder) or "")


def test_links_to_checkpoints_and_their_directories_are_refused(tmp_path: Path) -> None:
    elsewhere = _save(tmp_path / "other", 10)
    parent = tmp_path / "checkpoints"
    parent.mkdir()
    folder_of(parent, 10).symlink_to(elsewhere)
    assert "symbolic link" in (verify(folder_of(parent, 10)) or "")
    folder = _save(parent, 20)
    (folder / "model").rename(tmp_path / "model")
    (folder / "model").symlink_to(tmp_path / "model")
    assert "symbolic link" in (verify(folder) or "")
    with pytest.raises(CheckpointError):
        newest_good(parent, lambda line: None)
    assert verify(elsewhere) is None  # a link was renamed, not what it leads to


def test_a_manifest_of_any_size_is_not_read_into_memory(tmp_path: Path) -> None:
    folder = _save(tmp_path, 10)
    with (folder / directory.MANIFEST).open("wb") as file:
        file.truncate(2**40)  # bytes, of which the disk holds none
    assert "larger than" in (verify(folder) or "")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_storage_that_does_not_answer_makes_no_checkpoint_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folders = [_save(tmp_path, step) for step in (10, 20)]

    def fail(file: Path) -> str:
        raise OSError(number, os.strerror(number), str(file))

    with monkeypatch.context() as storage:
        storage.setattr(directory, "sha256_of", fail)
        with pytest.raises(CheckpointError, match=r"00020 cannot be read now .* start again"):
            newest_good(tmp_path, lambda line: None)
    assert newest_good(tmp_path, lambda line: None) == folders[1]


def test_what_stays(tmp_path: Path) -> None:
    for step in range(10, 90, 10):
        _save(tmp_path, step)
    quarantine(folder_of(tmp_path, 10), "by a test")
    prune(tmp_path, last=2, every=30)
    assert [directory.step_of(path) for path in checkpoints_in(tmp_path)] == [30, 60, 70, 80]
    _save(tmp_path, 85)
    prune(tmp_path, last=2, interval=10)  # that of a signal stays while it is the newest
    assert [directory.step_of(path) for path in checkpoints_in(tmp_path)] == [70, 80, 85]
    _save(tmp_path, 90)
    prune(tmp_path, last=2, interval=10)
    assert [directory.step_of(path) for path in checkpoints_in(tmp_path)] == [80, 90]
    for step in (100, 110, 120):
        _save(tmp_path, step)
    prune(tmp_path, last=1, interval=10, held=95)  # for a rollback to step 95
    assert [directory.step_of(path) for path in checkpoints_in(tmp_path)] == [90, 120]
    prune(tmp_path, last=1, interval=10, held=5)
    assert [directory.step_of(path) for path in checkpoints_in(tmp_path)] == [90, 120]
    prune(tmp_path, last=0)
    assert [directory.step_of(path) for path in checkpoints_in(tmp_path)] == [120]
    assert (tmp_path / "bad-step-00000010").is_dir()


def test_names_of_any_length_are_ordered_by_step(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        _save(tmp_path, step)
    (tmp_path / "step-notes").mkdir()
    found = [directory.step_of(path) for path in checkpoints_in(tmp_path)]
    assert found == [7, 99_999_999, 100_000_000]
