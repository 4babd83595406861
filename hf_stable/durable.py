"""Atomic and durable writing of files and folders; all files are written with it.

A reader, and a process that starts after a crash, finds the old content or the new one. The order
is always the same: flush the content to disk, rename it, flush the rename to disk. Standard library
only.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything below it to disk; links are not followed."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (Path(place) / name).is_symlink():
                sync(Path(place) / name)
        sync(Path(place))


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder that is on disk within its folder, and flush the new name to disk.

    Args:
        source: Path to rename.
        target: New path.

    Raises:
        OSError: If `target` is a folder that is not empty.
    """
    source.replace(target)
    sync(target.parent)


def write_file(path: Path, content: bytes, *, survives_crash: bool = True) -> None:
    """Write a file completely or not at all; create its folder if needed.

    Args:
        path: File to write.
        content: Content of the file.
        survives_crash: False does not wait for the disk, for content that is worthless after a
            crash of the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if survives_crash:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if survives_crash:
        sync(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a new folder beside `path`, which replaces `path` when the block ends without an error.

    A process killed at any moment loses neither the old folder nor a finished new one. While
    neither is named `path`, the old folder is `.old-NAME`, and the next call for the same path
    restores it.

    Args:
        path: Folder to write.
        replace: False refuses to replace a folder that is not empty.

    Yields:
        Temporary folder to fill.

    Raises:
        OSError: If a folder that is not empty may not be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.with_name(f".old-{path.name}")
    _settle(path, old)
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        if replace and path.exists():
            path.rename(old)  # the next rename flushes both to disk, without waiting in between
        try:
            rename(temporary, path)
        except OSError:
            _settle(path, old)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _settle(path: Path, old: Path) -> None:
    """Restore, or remove, the old folder that a killed replacement left."""
    if old.exists() and not path.exists():
        rename(old, path)
    shutil.rmtree(old, ignore_errors=True)


def remove_remains(path: Path) -> None:
    """Remove remains of killed `whole_folder` calls; no other process may be writing the path."""
    for temporary in path.parent.glob(f".tmp-{path.name}-????????"):
        shutil.rmtree(temporary, ignore_errors=True)
